"""JSON schemas of recipes, for editors (yaml-language-server) and scripts, from the config fields.

A schema is as wide as the loader: keys of a section may stand at the top of a stage recipe, and
nothing is required, because a flag may give it. `align validate` checks what must hold between
values.
"""

from collections.abc import Iterable, Mapping, Sequence
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from align.config.fields import LeafField, alternatives, bounds, config_class, leaf_fields
from align.config.outline import sentences
from align.config.rounds import RoundsConfig
from align.config.sections import Section
from align.stages import STAGES

DRAFT = "https://json-schema.org/draft/2020-12/schema"
KINDS = (*STAGES, "pipeline")

_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", NoneType: "null"}
_LIMITS = {
    "gt": "exclusiveMinimum",
    "ge": "minimum",
    "lt": "exclusiveMaximum",
    "le": "maximum",
}


def _object(properties: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, **more, "properties": properties}


def _value(annotation: Any) -> dict[str, Any]:
    """The schema of a value by its annotation."""
    found = [_part(part, metadata) for part, metadata in alternatives(annotation)]
    return found[0] if len(found) == 1 else {"anyOf": found}


def _part(part: Any, metadata: Sequence[Any]) -> dict[str, Any]:
    origin, arguments, limits = get_origin(part), get_args(part), bounds(metadata)
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is list:
        least = {"minItems": limits["min_length"]} if "min_length" in limits else {}
        return {"type": "array", "items": _value(arguments[0]), **least}
    if origin is dict:
        least = {"minProperties": limits["min_length"]} if "min_length" in limits else {}
        return {"type": "object", "additionalProperties": _value(arguments[1]), **least}
    if isinstance(part, type) and issubclass(part, Section):
        docs = sentences(part)
        fields = {
            name: {"description": docs.get(name, ""), **_value(field.annotation)}
            for name, field in part.model_fields.items()
        }
        return _object(fields)
    named = {"type": _TYPES[part]} if part in _TYPES else {}
    return named | {_LIMITS[name]: limit for name, limit in limits.items() if name in _LIMITS}


def _leaf(leaf: LeafField) -> dict[str, Any]:
    default = {} if leaf.required else {"default": leaf.default}
    return {"description": leaf.doc, **_value(leaf.annotation), **default}


def _stage(kind: str) -> dict[str, Any]:
    """The schema of a stage's recipe: its own keys, its sections, and the sections' keys again."""
    own: dict[str, Any] = {"stage": {"const": kind, "description": "Kind of the stage."}}
    sections: dict[str, dict[str, Any]] = {}
    bare: dict[str, Any] = {}
    for leaf in leaf_fields(config_class(kind)):
        place = sections.setdefault(leaf.section, {}) if leaf.section else own
        place[leaf.leaf] = bare[leaf.leaf] = _leaf(leaf)
    nested = {name: _object(keys) for name, keys in sections.items()}
    doc = (config_class(kind).__doc__ or "").strip()
    return _object(bare | nested | own, description=doc)


def _pipeline_stage(kind: str) -> dict[str, Any]:
    schema = _stage(kind)
    own: dict[str, Any] = {
        "recipe": {"type": "string", "description": "Stage recipe that this stage builds on."},
        "optional": {"type": "boolean", "description": "Run only when named by `--with`."},
    }
    properties = {key: value for key, value in schema["properties"].items() if key != "output_dir"}
    return schema | {"properties": own | properties}


def _any_of(values: Iterable[Any]) -> Any:
    different: list[Any] = []
    for value in values:
        if value not in different:
            different.append(value)
    return different[0] if len(different) == 1 else {"anyOf": different}


def _pipeline() -> dict[str, Any]:
    kinds = {kind: _pipeline_stage(kind) for kind in STAGES}
    shared: dict[str, list[Any]] = {}
    for schema in kinds.values():
        for name, value in schema["properties"].items():
            if name not in ("stage", "recipe", "optional"):
                shared.setdefault(name, []).append(value)
    stage = {
        "type": "object",
        "properties": {"stage": {"enum": list(STAGES), "description": "Kind of the stage."}},
        "allOf": [
            {
                "if": {"properties": {"stage": {"const": kind}}, "required": ["stage"]},
                "then": {"$ref": f"#/$defs/{kind}"},
            }
            for kind in STAGES
        ],
    }
    properties = {
        "output_dir": {
            "type": "string",
            "description": "Folder of the runs; a stage writes to its name's folder in it.",
        },
        "defaults": _object(
            {name: _any_of(values) for name, values in shared.items()},
            description="Keys for every stage that has them, below the stage's own.",
        ),
        "rounds": {
            "description": "Stages that repeat: their number, or a mapping.",
            "anyOf": [{"type": "integer", "minimum": 1}, _part(RoundsConfig, ())],
        },
        "stages": {
            "type": "object",
            "description": "Name -> stage, in order; `$name` is what an earlier one left.",
            "minProperties": 1,
            "additionalProperties": stage,
        },
    }
    return _object(properties, required=["stages"]) | {"$defs": kinds}


def schema_of(kind: str) -> dict[str, Any]:
    """The JSON schema of a stage's recipe, or of a pipeline (`pipeline`)."""
    if kind == "pipeline":
        return {"$schema": DRAFT, "title": "align pipeline", **_pipeline()}
    return {"$schema": DRAFT, "title": f"align {kind} recipe", **_stage(kind)}
