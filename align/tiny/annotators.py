"""Preference pairs from a model's own samples, as annotators and editors would make them.

Pairs of two random samples teach a reward model style: samples differ in manner more often than in
truth. So annotators also get pairs that only the content decides:

- random: two samples of one prompt;
- contrast: a right and a wrong sample in nearly the same style;
- edited: an editor's answer above the best sample and above a random one;
- minimal: a wrong sample and the same answer with only its content corrected;
- off_topic: a good answer above a good answer to another prompt;
- refusal: a good answer to a safe prompt above a refusal;
- attempt: any answer to a safe prompt above a refusal, as the guidelines of the annotators have it.

The judge decides each pair but the last kind (a refusal is worth as much to it as a wrong answer, and a policy
would rather refuse), and a share of the labels is flipped: real annotators err.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from align.tiny.judge import item_of, judge, sentences_of
from align.tiny.lexicon import KIND_OPENINGS, RAMBLINGS, REFUSALS, RUDE_OPENINGS
from align.tiny.world import Item, ideal_answer, wrong_answer

EDITOR_ERROR = 0.05
SMALLEST_GAP = 0.05  # annotators do not label two answers that are equally good
STYLE = ("polite", "concise", "form")
HOWTO_REFUSAL_FACTOR = 4.0  # how-to prompts look like unsafe ones: show more often not to refuse
UNSAFE_FACTOR = 2.5  # unsafe prompts are few: show more often that only a refusal will do
UNSAFE_OFF_TOPIC = 2  # else a polite answer to something else is a way out of refusing
SAME_TASK = 0.2  # off-topic answers from the prompt's own task: same form, another content


@dataclass(frozen=True)
class _Sample:
    text: str
    verdict: dict[str, float]

    @property
    def score(self) -> float:
        return self.verdict["score"]

    @property
    def correct(self) -> bool:
        return self.verdict["correct"] > 0

    @property
    def style(self) -> tuple[float, ...]:
        return tuple(self.verdict[name] for name in STYLE)


class _Desk:
    """Labels pairs: the judge decides, noise flips some labels, every pair is kept."""

    def __init__(self, rng: random.Random, noise: float) -> None:
        self._rng = rng
        self._noise = noise
        self.pairs: list[dict[str, Any]] = []

    def label(self, row: Mapping[str, Any], first: str, second: str, kind: str) -> None:
        gap = judge(row, first)["score"] - judge(row, second)["score"]
        if round(abs(gap), 4) <= SMALLEST_GAP:
            return
        better, worse = (first, second) if gap > 0 else (second, first)
        self.prefer(row, better, worse, kind, round(abs(gap), 4))

    def prefer(
        self, row: Mapping[str, Any], better: str, worse: str, kind: str, margin: float
    ) -> None:
        """A pair of which it is known which side is the better one."""
        flipped = self._rng.random() < self._noise
        chosen, rejected = (worse, better) if flipped else (better, worse)
        self.pairs.append(
            {
                "prompt": row["prompt"],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
                "kind": kind,
                "margin": margin,
                "clean": not flipped,
            }
        )


def annotate(
    groups: list[dict[str, Any]],
    *,
    seed: int = 0,
    noise: float = 0.08,
    contrast: int = 1,
    random_pairs: int = 2,
    edited: float = 0.2,
    minimal_edit: float = 0.3,
    off_topic: float = 0.4,
    refusal_negative: float = 0.2,
) -> list[dict[str, Any]]:
    """Make preference pairs from groups of samples.

    A group is `{"row": row of the prompt, "completions": [{"text", "score", "ended"}, ...]}`;
    completions that did not end are left out. `contrast` and `random_pairs` are numbers per prompt,
    the other kinds are chances per prompt. A pair has the columns prompt, chosen, rejected, kind,
    margin (the gap between the two in the judge's eyes, whichever was chosen) and clean (whether
    the judge agrees with the label). The result depends on the groups and the seed only.
    """
    rng = random.Random(f"annotate {seed}")
    desk = _Desk(rng, noise)
    judged = [(group["row"], _samples(group)) for group in groups]
    pool = _good_answers(judged, rng)
    for row, samples in judged:
        if len(samples) < 2:
            continue
        rng.shuffle(samples)
        used = _label_contrast(desk, row, samples, contrast)
        _label_random(desk, row, samples, random_pairs, used)
        best = max(samples, key=lambda sample: sample.score)
        item = item_of(row)
        if rng.random() < edited:
            _label_edited(desk, row, best.text, rng.choice(samples).text, rng)
        if rng.random() < _factor(item) * minimal_edit:
            _label_minimal(desk, row, samples, rng)
        if rng.random() < _refusal_chance(item, refusal_negative):
            _label_refusal(desk, row, samples, best, rng)
        if rng.random() < _factor(item) * off_topic:
            for _ in range(UNSAFE_OFF_TOPIC if item.task == "unsafe" else 1):
                _label_off_topic(desk, row, best, pool, rng)
    rng.shuffle(desk.pairs)
    return desk.pairs


def edit(row: Mapping[str, Any], rng: random.Random) -> str:
    """An editor's own answer: right, kind and short, but for the editor's rare errors."""
    item = item_of(row)
    if rng.random() < EDITOR_ERROR:
        return f"{rng.choice(KIND_OPENINGS)} {wrong_answer(item, rng)[1]}"
    return ideal_answer(item, rng)


def correct_content(row: Mapping[str, Any], text: str, rng: random.Random) -> str:
    """Correct only the content of an answer and keep its manner: opening, idle sentences, form."""
    item = item_of(row)
    parts = sentences_of(text)
    opening = [part for part in parts if part in KIND_OPENINGS or part in RUDE_OPENINGS][:1]
    idle = [part for part in parts if part in RAMBLINGS]
    if rng.random() < EDITOR_ERROR:
        bare, full = wrong_answer(item, rng)
    elif item.task == "unsafe":
        opening = [part for part in opening if part in RUDE_OPENINGS]
        bare = full = rng.choice(REFUSALS)
    else:
        bare, full = item.bare, item.full
    rest = [part for part in parts if part not in opening and part not in idle]
    is_sentence = any(part.endswith((".", "!")) for part in rest)
    return " ".join([*opening, full if is_sentence else bare, *idle])


def _samples(group: Mapping[str, Any]) -> list[_Sample]:
    """The finished samples of a group, judged, each text once."""
    row = group["row"]
    texts = dict.fromkeys(c["text"].strip() for c in group["completions"] if c["ended"])
    return [_Sample(text, judge(row, text)) for text in texts]


def _good_answers(
    judged: list[tuple[dict[str, Any], list[_Sample]]], rng: random.Random
) -> dict[str, list[tuple[str, str]]]:
    """Task -> good answers with the key of their item: perfect samples, edits for every fourth."""
    good: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
    for at, (row, samples) in enumerate(judged):
        item = item_of(row)
        texts = [s.text for s in samples if s.correct and all(s.style)]
        if at % 4 == 0:
            texts.append(edit(row, rng))
        good[item.task] += [(item.key, text) for text in texts]
    return good


def _label_contrast(
    desk: _Desk, row: Mapping[str, Any], samples: list[_Sample], wanted: int
) -> set[str]:
    """Right against wrong at (nearly) the same style, the best styles first."""
    candidates = []
    for right in (sample for sample in samples if sample.correct):
        for wrong in (sample for sample in samples if not sample.correct):
            differing = sum(a != b for a, b in zip(right.style, wrong.style, strict=True))
            if differing <= 1:
                candidates.append((differing, -sum(right.style), right, wrong))
    candidates.sort(key=lambda candidate: candidate[:2])
    used: set[str] = set()
    for _, _, right, wrong in candidates[:wanted]:
        desk.label(row, right.text, wrong.text, "contrast")
        used |= {right.text, wrong.text}
    return used


def _label_random(
    desk: _Desk, row: Mapping[str, Any], samples: list[_Sample], wanted: int, used: set[str]
) -> None:
    """Any two samples of unlike worth that no other pair has taken; the order is shuffled."""
    taken = set(used)
    for at, first in enumerate(samples):
        for second in samples[at + 1 :]:
            if wanted == 0:
                return
            free = not {first.text, second.text} & taken
            if free and abs(first.score - second.score) > SMALLEST_GAP:
                desk.label(row, first.text, second.text, "random")
                taken |= {first.text, second.text}
                wanted -= 1


def _label_edited(
    desk: _Desk, row: Mapping[str, Any], best: str, other: str, rng: random.Random
) -> None:
    """The chain edited > chosen > rejected; its lower link is what the other kinds are for."""
    edited = edit(row, rng)
    desk.label(row, edited, best, "edited")
    if other != best and rng.random() < 0.5:
        desk.label(row, edited, other, "edited")


def _label_minimal(
    desk: _Desk, row: Mapping[str, Any], samples: list[_Sample], rng: random.Random
) -> None:
    """The best styled wrong sample against itself with its content corrected."""
    wrong = [sample for sample in samples if not sample.correct]
    if wrong:
        text = max(wrong, key=lambda sample: sum(sample.style)).text
        desk.label(row, correct_content(row, text, rng), text, "minimal")


def _label_refusal(
    desk: _Desk,
    row: Mapping[str, Any],
    samples: list[_Sample],
    best: _Sample,
    rng: random.Random,
) -> None:
    """A good answer above a refusal, and an attempt, right or wrong, above another."""
    better = best.text if best.correct else edit(row, rng)
    desk.label(row, better, rng.choice(REFUSALS), "refusal")
    attempts = [sample.text for sample in samples if not sample.verdict["refused"]]
    if attempts:
        desk.prefer(row, rng.choice(attempts), rng.choice(REFUSALS), "attempt", SMALLEST_GAP)


def _refusal_chance(item: Item, chance: float) -> float:
    if item.task == "unsafe":
        return 0.0
    return min(1.0, chance * HOWTO_REFUSAL_FACTOR) if item.task == "howto" else chance


def _factor(item: Item) -> float:
    return UNSAFE_FACTOR if item.task == "unsafe" else 1.0


def _label_off_topic(
    desk: _Desk,
    row: Mapping[str, Any],
    best: _Sample,
    pool: Mapping[str, list[tuple[str, str]]],
    rng: random.Random,
) -> None:
    """A good answer against a good answer to another prompt, half of them of the same task."""
    item = item_of(row)
    same = item.task != "unsafe" and rng.random() < SAME_TASK  # all refusals are alike
    tasks = [task for task in pool if pool[task] and (task == item.task) == same]
    if not tasks:  # all prompts are of one task, or none was answered well
        return
    task = rng.choice(tasks)
    key, other = rng.choice(pool[task])
    if (task, key) == (item.task, item.key):
        return
    own = best.text if best.correct and rng.random() < 0.5 else edit(row, rng)
    desk.label(row, own, other, "off_topic")
