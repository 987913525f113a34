"""JSON schemas: valid themselves, and of the same mind as the loader."""

from pathlib import Path

import pytest

from align.config.fields import config_class, leaf_fields
from align.config.load import is_pipeline, load_pipeline, load_stage, read_recipe
from align.config.schema import KINDS, schema_of
from align.resources import shipped_recipes
from align.stages import STAGES

RECIPES = shipped_recipes()


@pytest.mark.parametrize("recipe", RECIPES, ids=[recipe.name for recipe in RECIPES])
def test_every_shipped_recipe_loads(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    document, _ = read_recipe(recipe.name)
    load = load_pipeline if is_pipeline(document) else load_stage
    load(recipe.name, ready=False)
    assert recipe.kind == ("pipeline" if is_pipeline(document) else document.data["stage"])
    assert recipe.summary


@pytest.mark.parametrize("kind", STAGES)
def test_a_schema_has_every_key_flat_and_nested_with_its_sentence(kind):
    schema = schema_of(kind)
    for leaf in leaf_fields(config_class(kind)):
        assert schema["properties"][leaf.leaf]["description"] == leaf.doc
        if leaf.section:
            section = schema["properties"][leaf.section]
            assert section["properties"][leaf.leaf] == schema["properties"][leaf.leaf]
    assert "required" not in schema


@pytest.mark.parametrize("kind", STAGES)
def test_values_are_described_as_pydantic_describes_them(kind):
    """Types, bounds, choices and defaults of every key, against pydantic's own generator."""

    def plain(value):
        if isinstance(value, list):
            return [plain(item) for item in value]
        if not isinstance(value, dict):
            return value
        kept = {k: plain(v) for k, v in value.items() if k not in ("title", "description")}
        if "const" in kept:
            kept = {"enum": [kept["const"]]} | {k: v for k, v in kept.items() if k == "default"}
        if "enum" in kept:
            kept.pop("type", None)
        if "$ref" in kept:
            name = kept.pop("$ref").rpartition("/")[2]
            kept |= plain(theirs["$defs"][name])
            kept.pop("required", None)
            kept["properties"] = {
                key: {k: v for k, v in item.items() if k != "default"}
                for key, item in kept["properties"].items()
            }
        if kept.get("additionalProperties") is True:
            kept["additionalProperties"] = {}
        return kept

    ours = schema_of(kind)["properties"]
    theirs = config_class(kind).model_json_schema()
    for leaf in leaf_fields(config_class(kind)):
        place = theirs
        if leaf.section:
            name = theirs["properties"][leaf.section]["$ref"].rpartition("/")[2]
            place = theirs["$defs"][name]
        told = plain(place["properties"][leaf.leaf])
        if "default" not in told and not leaf.required:
            told["default"] = leaf.default  # made by a function
        assert plain(ours[leaf.leaf]) == told, leaf.name


def check(schema, data) -> list[str]:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(schema)
    return [error.message for error in validator.iter_errors(data)]


@pytest.mark.parametrize("kind", KINDS)
def test_schemas_are_schemas(kind):
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(schema_of(kind))


@pytest.mark.parametrize("recipe", RECIPES, ids=[recipe.name for recipe in RECIPES])
def test_shipped_recipes_fit_their_schema(recipe):
    assert not check(schema_of(recipe.kind), read_recipe(Path(recipe.path))[0].data)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("sft", {"learnin_rate": 1}),
        ("sft", {"trainer": {"learnin_rate": 1}}),
        ("sft", {"learning_rate": -1}),
        ("sft", {"model": {"dtype": "bf16"}}),
        ("sft", {"data": {"datasets": [{"wieght": 1}]}}),
        ("pipeline", {}),
        ("pipeline", {"stages": {}}),
        ("pipeline", {"stages": {"a": {"stage": "stf"}}}),
        ("pipeline", {"stages": {"a": {"stage": "sft", "beta": 1}}}),
        ("pipeline", {"stages": {"a": {"stage": "sft", "output_dir": "x"}}}),
        ("pipeline", {"stages": {"a": {"stage": "sft"}}, "defaults": {"zzz": 1}}),
    ],
)
def test_schemas_refuse_what_the_loader_refuses(kind, data):
    assert check(schema_of(kind), data)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("sft", {"learning_rate": 1e-5, "trainer": {"seed": 1}}),
        ("dpo", {"loss_type": ["sigmoid", "sft"]}),
        ("pipeline", {"stages": {"a": {"stage": "dpo", "optional": True, "beta": 0.1}}}),
        ("pipeline", {"stages": {"a": {"recipe": "x.yaml"}}, "defaults": {"seed": 1}}),
    ],
)
def test_schemas_accept_what_the_loader_accepts(kind, data):
    assert not check(schema_of(kind), data)
