"""Which answers a model has to give, so that no draw is made twice."""

import pytest

from align.evaluation.answering import PLAIN, Setting, wanted
from align.stages.evaluate import EvalConfig


def config(**changes) -> EvalConfig:
    recipe = {
        "output_dir": "x",
        "models": {"sft": "a", "dpo": "b"},
        "data": {"dataset_name": "d"},
        "judge": "number",
        "reward_model": "r",
    }
    return EvalConfig(**(recipe | changes))


NUCLEUS = {"top_p": 0.9, "top_k": 5}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {Setting(0.0): 1}),
        ({"reference": "dpo"}, {Setting(0.0): 1}),
        ({"reference": "sft"}, {Setting(0.0): 1, PLAIN: 1}),
        (
            {"reference": "sft", "generation": {"temperatures": [1.0, 0.0]}},
            {PLAIN: 1, Setting(0.0): 1},
        ),
        (
            {"reference": "sft", "generation": {"temperatures": [1.0], **NUCLEUS}},
            {Setting(1.0, 0.9, 5): 1, PLAIN: 1},
        ),
        (
            {"best_of": {"dpo": 8}, "generation": {"temperatures": [1.0, 0.5]}},
            {PLAIN: 8, Setting(0.5): 1},
        ),
        ({"best_of": {"dpo": 8}, "reference": "sft"}, {Setting(0.0): 1, PLAIN: 8}),
        ({"generation": {"temperatures": [0.0], **NUCLEUS}}, {Setting(0.0): 1}),
    ],
)
def test_wanted_answers(changes, expected):
    assert wanted(config(**changes), "dpo") == expected
