"""JSON schemas of recipes, for editors (yaml-language-server) and scripts, from the config fields.

A schema is as wide as the loader: keys of a section may stand at the top of a stage recipe, and
nothing is required, because a flag may give it. `align validate` checks what must hold between
values.
"""

from collections.abc import Mapping
from typing import Any

from align.config.fields import config_class, leaf_fields
from align.stages import STAGES

DRAFT = "https://json-schema.org/draft/2020-12/schema"
KINDS = (*STAGES, "pipeline")


def _open(schema: Any) -> Any:
    """A pydantic schema without `required`, and without the titles that repeat the names."""
    if isinstance(schema, list):
        return [_open(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {
        key: {name: _open(item) for name, item in value.items()}
        if key in ("properties", "$defs")
        else _open(value)
        for key, value in schema.items()
        if key not in ("required", "title")
    }


def _stage(kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The schema of a stage's recipe, and the definitions that it refers to."""
    config = config_class(kind)
    schema = _open(config.model_json_schema())
    definitions: dict[str, Any] = schema.pop("$defs", {})
    properties = schema["properties"]
    names = [leaf.leaf for leaf in leaf_fields(config)]
    for leaf in leaf_fields(config):
        if leaf.section and names.count(leaf.leaf) == 1 and leaf.leaf not in properties:
            section = definitions[_definition(schema, leaf.section)]
            properties[leaf.leaf] = section["properties"][leaf.leaf]
    return schema, definitions


def _definition(schema: Mapping[str, Any], section: str) -> str:
    reference: str = schema["properties"][section]["$ref"]
    return reference.rpartition("/")[2]


def stage_schema(kind: str) -> dict[str, Any]:
    """The JSON schema of a stage's recipe."""
    schema, definitions = _stage(kind)
    head = {"$schema": DRAFT, "title": f"align {kind} recipe"}
    return head | schema | {"$defs": definitions}


def _in_pipeline(kind: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    properties = {key: value for key, value in schema["properties"].items() if key != "output_dir"}
    own: dict[str, Any] = {
        "recipe": {"type": "string", "description": "Stage recipe that this stage builds on."},
        "optional": {"type": "boolean", "description": "Run only when named by `--with`."},
    }
    return {**schema, "properties": {"stage": {"const": kind}, **own, **properties}}


def pipeline_schema() -> dict[str, Any]:
    """The JSON schema of a pipeline file."""
    definitions: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    cases = []
    for kind in STAGES:
        schema, own = _stage(kind)
        definitions |= own | {f"{kind}-stage": _in_pipeline(kind, schema)}
        for name, value in schema["properties"].items():
            if name not in ("stage", "output_dir"):
                defaults.setdefault(name, []).append(value)
        cases.append(
            {
                "if": {"properties": {"stage": {"const": kind}}, "required": ["stage"]},
                "then": {"$ref": f"#/$defs/{kind}-stage"},
            }
        )
    stage = {
        "type": "object",
        "properties": {"stage": {"enum": list(STAGES), "description": "Kind of the stage."}},
        "allOf": cases,
    }
    shared = {name: _any_of(values) for name, values in defaults.items()}
    return {
        "$schema": DRAFT,
        "title": "align pipeline",
        "type": "object",
        "additionalProperties": False,
        "required": ["stages"],
        "properties": {
            "output_dir": {
                "type": "string",
                "description": "Folder of the runs; a stage writes to its name's folder in it.",
            },
            "defaults": {
                "type": ["object", "null"],
                "description": "Keys for every stage that has them, below the stage's own.",
                "additionalProperties": False,
                "properties": shared,
            },
            "stages": {
                "type": "object",
                "description": "Name -> stage, in order; `$name` is what an earlier one left.",
                "minProperties": 1,
                "additionalProperties": stage,
            },
        },
        "$defs": definitions,
    }


def _any_of(values: list[Any]) -> Any:
    different = [value for at, value in enumerate(values) if value not in values[:at]]
    return different[0] if len(different) == 1 else {"anyOf": different}


def schema_of(kind: str) -> dict[str, Any]:
    """The JSON schema of a stage's recipe, or of a pipeline (`pipeline`)."""
    return pipeline_schema() if kind == "pipeline" else stage_schema(kind)
