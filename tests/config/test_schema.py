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
        assert schema["properties"][leaf.leaf]["description"].split() == leaf.doc.split()
        if leaf.section:
            name = schema["properties"][leaf.section]["$ref"].rpartition("/")[2]
            assert leaf.leaf in schema["$defs"][name]["properties"]
    assert "required" not in schema


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
