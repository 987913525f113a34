"""Preference pairs: deterministic, noisy at the given rate, of the kinds they claim to be."""

from __future__ import annotations

import copy
import random
from functools import cache
from typing import Any

from align.tiny.annotators import annotate, correct_content
from align.tiny.dataset import prompt_rows
from align.tiny.judge import is_refusal, item_of, judge, task_of
from align.tiny.probes import PROBES, accuracy_by_name, natural_pairs, style_fixed_probes
from align.tiny.world import writer_answer

KINDS = {"contrast", "random", "edited", "minimal", "off_topic", "refusal", "attempt"}


@cache
def _groups(n: int = 600) -> list[dict[str, Any]]:
    """Samples as a model might give them: writers' answers, some cut off."""
    rng = random.Random(0)
    groups = []
    for row in prompt_rows("pref", n, 0):
        texts = [writer_answer(item_of(row), rng) for _ in range(6)]
        completions = [
            {"text": t, "score": judge(row, t)["score"], "ended": rng.random() < 0.9} for t in texts
        ]
        groups.append({"row": row, "completions": completions})
    return groups


def _texts(pair: dict[str, Any]) -> tuple[str, str]:
    return pair["chosen"][0]["content"], pair["rejected"][0]["content"]


def _rows() -> dict[str, dict[str, Any]]:
    return {group["row"]["prompt"][0]["content"]: group["row"] for group in _groups()}


def test_the_seed_decides_and_the_groups_stay_as_they_are() -> None:
    before = copy.deepcopy(_groups())
    assert annotate(_groups(), seed=3) == annotate(_groups(), seed=3)
    assert annotate(_groups(), seed=3) != annotate(_groups(), seed=4)
    assert _groups() == before


def test_pairs_have_every_kind_and_the_columns_of_a_trainer() -> None:
    pairs = annotate(_groups())
    assert {pair["kind"] for pair in pairs} == KINDS
    for pair in pairs:
        assert set(pair) == {"prompt", "chosen", "rejected", "kind", "margin", "clean"}
        assert pair["prompt"][0]["role"] == "user"
        assert pair["chosen"][0]["role"] == pair["rejected"][0]["role"] == "assistant"
        assert pair["margin"] > 0.05 or pair["kind"] == "attempt"


def test_labels_agree_with_the_judge_but_for_the_noise() -> None:
    rows = _rows()
    pairs = annotate(_groups(), noise=0.08)
    for pair in pairs:
        row = rows[pair["prompt"][0]["content"]]
        chosen, rejected = (judge(row, text)["score"] for text in _texts(pair))
        assert (chosen > rejected) == pair["clean"] or pair["kind"] == "attempt"
    noisy = sum(not pair["clean"] for pair in pairs)
    assert abs(noisy / len(pairs) - 0.08) < 3 * (0.08 * 0.92 / len(pairs)) ** 0.5
    assert all(pair["clean"] for pair in annotate(_groups(), noise=0.0))


def test_an_attempt_at_a_safe_prompt_stands_above_a_refusal() -> None:
    rows = _rows()
    pairs = [pair for pair in annotate(_groups(), noise=0.0) if pair["kind"] == "attempt"]
    assert len(pairs) > 10
    wrong = 0
    for pair in pairs:
        row = rows[pair["prompt"][0]["content"]]
        assert row["task"] != "unsafe"
        chosen, rejected = (judge(row, text) for text in _texts(pair))
        assert rejected["refused"]
        assert not chosen["refused"]
        wrong += not chosen["correct"]
    assert wrong > 0


def _verdicts(kind: str) -> list[tuple[dict[str, float], dict[str, float]]]:
    rows = _rows()
    verdicts = []
    for pair in annotate(_groups(), noise=0.0):
        if pair["kind"] == kind:
            row = rows[pair["prompt"][0]["content"]]
            chosen, rejected = _texts(pair)
            verdicts.append((judge(row, chosen), judge(row, rejected)))
    return verdicts


def test_contrast_pairs_differ_in_truth_and_hardly_in_style() -> None:
    for chosen, rejected in _verdicts("contrast"):
        assert chosen["correct"] > rejected["correct"]
        assert sum(chosen[name] != rejected[name] for name in ("polite", "concise", "form")) <= 1


def test_minimal_edits_differ_in_truth_but_for_the_errors_of_the_editor() -> None:
    verdicts = _verdicts("minimal")
    assert sum(chosen["correct"] > rejected["correct"] for chosen, rejected in verdicts) > (
        0.9 * len(verdicts)
    )


def test_off_topic_answers_are_good_answers_to_another_prompt() -> None:
    rows = _rows()
    pairs = [p for p in annotate(_groups(), noise=0.0) if p["kind"] == "off_topic"]
    assert len(pairs) > 100
    good = 0
    for pair in pairs:
        chosen, rejected = _texts(pair)
        row = rows[pair["prompt"][0]["content"]]
        assert judge(row, chosen)["score"] > judge(row, rejected)["score"]
        good += judge(row, rejected)["correct"] == 0
    assert good / len(pairs) > 0.9


def test_refusals_are_rejected_on_safe_prompts_only_and_more_on_howto() -> None:
    rows = _rows()
    pairs = [p for p in annotate(_groups(), noise=0.0) if p["kind"] == "refusal"]
    tasks = [task_of(rows[pair["prompt"][0]["content"]]) for pair in pairs]
    assert "unsafe" not in tasks
    assert all(is_refusal(_texts(pair)[1]) and not is_refusal(_texts(pair)[0]) for pair in pairs)
    howto = sum(task_of(row) == "howto" for row in rows.values())
    safe = sum(task_of(row) not in ("howto", "unsafe") for row in rows.values())
    assert tasks.count("howto") / howto > 2 * (len(tasks) - tasks.count("howto")) / safe


def test_unsafe_prompts_get_more_pairs_that_only_a_refusal_wins() -> None:
    rows = _rows()
    unsafe = sum(task_of(row) == "unsafe" for row in rows.values())
    pairs = annotate(_groups(), noise=0.0)
    for kind, factor in (("off_topic", 4), ("minimal", 2)):
        prompts = [p["prompt"][0]["content"] for p in pairs if p["kind"] == kind]
        found = [pair for pair in prompts if task_of(rows[pair]) == "unsafe"]
        assert len(found) / unsafe > factor * (len(prompts) - len(found)) / (len(rows) - unsafe)


def test_unfinished_completions_are_left_out() -> None:
    groups = copy.deepcopy(_groups()[:200])
    for group in groups:
        group["completions"][0].update(text="Sure! UNFINISHED", ended=False)
    for pair in annotate(groups):
        assert "UNFINISHED" not in " ".join(_texts(pair))
    for group in groups:
        for completion in group["completions"]:
            completion["ended"] = False
    assert annotate(groups) == []


def test_settings_switch_kinds_off() -> None:
    pairs = annotate(
        _groups(), contrast=0, edited=0.0, minimal_edit=0.0, off_topic=0.0, refusal_negative=0.0
    )
    assert {pair["kind"] for pair in pairs} == {"random"}
    assert annotate([]) == []


def test_prompts_of_a_single_task_are_enough() -> None:
    groups = [group for group in _groups() if group["row"]["task"] == "math"]
    assert {"contrast", "off_topic"} <= {pair["kind"] for pair in annotate(groups)}
    groups = [group for group in _groups() if group["row"]["task"] == "unsafe"]
    assert "off_topic" not in {pair["kind"] for pair in annotate(groups)}


def test_a_minimal_edit_keeps_the_manner() -> None:
    row = next(row for row in _rows().values() if task_of(row) == "math")
    text = "What a silly question. 77 There are many things one could say about it."
    item = item_of(row)
    edits = {correct_content(row, text, random.Random(seed)) for seed in range(40)}
    assert any(edit.startswith(f"What a silly question. {item.full[:1]}") for edit in edits)
    assert all(edit.startswith("What a silly question.") for edit in edits)


def test_probes_are_won_by_the_judge() -> None:
    rows = prompt_rows("val", 300, 2026)
    probes = style_fixed_probes(rows, seed=0)
    assert probes == style_fixed_probes(rows, seed=0)
    assert {probe["name"] for probe in probes} == set(PROBES)
    by_prompt = {row["prompt"][0]["content"]: row for row in rows}
    wins = []
    for probe in probes:
        row = by_prompt[probe["prompt"][0]["content"]]
        wins.append(judge(row, probe["better"])["score"] > judge(row, probe["worse"])["score"])
    assert set(accuracy_by_name(probes, wins).values()) == {1.0}


def test_natural_pairs_come_from_finished_samples_with_a_gap() -> None:
    pairs = natural_pairs(_groups()[:100])
    assert all(pair["gap"] > 0.05 for pair in pairs)
    alike = [pair for pair in pairs if pair["same_style"]]
    assert alike
    assert all(pair["correctness_differs"] for pair in alike)
