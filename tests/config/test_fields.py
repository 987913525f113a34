"""Fields as knobs: names, types in words, and the outline that help reads without pydantic."""

from typing import Any

import pytest

from align.config.fields import (
    choices,
    config_class,
    describe,
    leaf_fields,
    mentioned,
    models,
    short_type,
)
from align.config.outline import outline
from align.config.sections import DatasetEntry
from align.options import EVERYDAY, PANELS, brief, everyday
from align.stages import STAGES

BY_NAME = {(kind, leaf.name): leaf for kind in STAGES for leaf in leaf_fields(config_class(kind))}


@pytest.mark.parametrize(
    ("kind", "name", "words", "short"),
    [
        ("sft", "trainer.learning_rate", "a number, above 0", "float > 0"),
        ("sft", "trainer.adam_beta1", "a number, at least 0 and at most 1", "float >= 0, <= 1"),
        (
            "sft",
            "data.test_split_size",
            "a number, above 0 and below 1",
            "float > 0, < 1 or int > 0 or null",
        ),
        ("sft", "lora.lora_r", "a whole number, above 0", "int > 0"),
        ("sft", "data.packing", "true or false", "bool"),
        ("sft", "lora.lora_target_modules", "text or a list of texts", "text or list of text"),
        ("sft", "data.datasets", "a list of mappings", "list of mapping or null"),
        ("sft", "data.columns", "a mapping `{key: value}`", "mapping or null"),
        ("sft", "model.dtype", "one of `auto`, `float32`, `bfloat16`, `float16`", None),
        ("sft", "lora.trainable_token_indices", "`control` or a list of whole numbers", None),
        ("eval", "generation.temperatures", "a list of numbers", None),
    ],
)
def test_types_in_words(kind, name, words, short):
    leaf = BY_NAME[kind, name]
    assert describe(leaf.annotation).startswith(words)
    assert short is None or short_type(leaf.annotation) == short


def test_what_an_annotation_mentions():
    leaf = BY_NAME["sft", "data.datasets"]
    assert models(leaf.annotation) == [DatasetEntry]
    assert {str, float, type(None)} <= mentioned(leaf.annotation)
    assert bool not in mentioned(leaf.annotation)
    assert Any in mentioned(BY_NAME["sft", "trainer.extra"].annotation)
    assert choices(BY_NAME["sft", "data.truncation_mode"].annotation) == ("keep_start", "drop")


def test_every_knob_has_a_sentence():
    without = [key for key, leaf in BY_NAME.items() if not leaf.doc]
    assert not without


def test_required_knobs_have_no_default():
    required = {key[1] for key, leaf in BY_NAME.items() if leaf.required}
    assert required == {"output_dir", "model.model_name_or_path", "models", "run"}


@pytest.mark.parametrize("kind", STAGES)
def test_the_outline_says_what_the_fields_say(kind):
    knobs, leaves = outline(kind), {leaf.name: leaf for leaf in leaf_fields(config_class(kind))}
    assert set(knobs) - {"stage"} == set(leaves)
    for name, leaf in leaves.items():
        assert knobs[name].doc == leaf.doc
        if knobs[name].default is not None or leaf.default is None:
            assert knobs[name].default == leaf.default
        wanted = mentioned(leaf.annotation)
        if wanted == {bool}:
            assert knobs[name].value == "BOOL"
        elif str not in wanted and (wanted & {int, float}):
            assert knobs[name].value == ("FLOAT" if float in wanted else "INT")


@pytest.mark.parametrize("kind", STAGES)
def test_everyday_flags_are_keys_of_the_stage_and_told_apart(kind):
    knobs = everyday(kind)
    assert len({knob.leaf for knob in knobs}) == len(knobs) == len(EVERYDAY[kind])
    assert all(knob.section in PANELS for knob in knobs)
    assert all(brief(knob) and len(brief(knob)) < 100 for knob in knobs)
