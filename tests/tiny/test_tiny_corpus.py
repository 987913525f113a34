"""Pretraining text: what it may hold, and that the shipped base was trained on this text."""

from __future__ import annotations

import hashlib
import random
import re
from itertools import islice

import pytest

from align.tiny.corpus import document, documents, mark_document, quiz_document
from align.tiny.lexicon import FACTS, JOBS, UNSAFE
from align.tiny.world import GREETINGS, make_items

# Of the first 2,000 documents of seed 1 in each phase. A change of the world or of its text changes
# these: then pretrain the base anew (recipes/tiny/base) and write the new fingerprints here.
FINGERPRINTS = {
    "main": "344f6f5fcb12c04b980e935c01ee464a5753732536a80ce3785b50dc9f06b5ec",
    "annealing": "b49c75de74d492a810171587f678c2252df58173fbec490623247892048b7efb",
}


@pytest.mark.parametrize("phase", FINGERPRINTS)
def test_the_text_is_the_one_that_the_base_was_trained_on(phase: str) -> None:
    text = "\n".join(islice(documents(1, phase), 2000))
    assert hashlib.sha256(text.encode()).hexdigest() == FINGERPRINTS[phase]


@pytest.mark.parametrize("phase", FINGERPRINTS)
def test_no_control_tokens(phase: str) -> None:
    assert not any("<|" in text for text in islice(documents(2, phase), 3000))


@pytest.mark.parametrize("phase", FINGERPRINTS)
def test_unsafe_requests_are_never_asked(phase: str) -> None:
    deeds = [f"{verb} {thing}" for verb, thing in UNSAFE]
    for text in islice(documents(3, phase), 5000):
        for deed in deeds:
            if deed in text:
                assert not re.search(r"How do I|What do I|Tell me|What should I", text)


def test_questions_are_of_the_sft_split_only() -> None:
    """Every held-out question is looked for in documents that answer questions."""
    rng = random.Random(4)
    asked = " ".join(maker(rng) for _ in range(3000) for maker in (quiz_document, mark_document))
    for split in ("pref", "rl", "val", "test"):
        for item in make_items(split, 250, 0):
            assert item.question not in asked
    # the same search does find questions of the SFT split
    assert sum(item.question in asked for item in make_items("sft", 250, 0)) > 50


def test_prose_holds_every_fact_and_every_job() -> None:
    rng = random.Random(5)
    sentences = [s for _ in range(40_000) for s in document(rng).split(". ")]
    facts = {
        (isle, attribute, FACTS[isle][attribute]) for isle in FACTS for attribute in FACTS[isle]
    }
    told = " \n".join(s for s in sentences if "?" not in s)
    for isle, _, value in facts:
        assert re.search(rf"{isle}[^\n]*\b{value}\b|\b{value}\b[^\n]*{isle}", told)
    assert all(f"{verb} {thing}" in told for verb, thing in JOBS)


def test_the_annealing_text_has_no_wrong_attempts() -> None:
    for text in islice(documents(9, "annealing"), 3000):
        assert not re.search(r"Mark:|That is (right|wrong)", text)


def test_marks_are_as_often_right_as_wrong() -> None:
    rng = random.Random(6)
    text = " ".join(mark_document(rng) for _ in range(4000))
    right, wrong = len(re.findall(r"\bright\.", text)), len(re.findall(r"\bwrong\.", text))
    assert 0.45 < right / (right + wrong) < 0.55


def test_greetings_belong_to_the_chat_only() -> None:
    greetings = [greeting for greeting in set(GREETINGS) if greeting]
    rng = random.Random(7)
    for _ in range(2000):
        assert not quiz_document(rng).startswith(tuple(greetings))


def test_every_task_is_asked() -> None:
    rng = random.Random(8)
    asked = " ".join(quiz_document(rng) for _ in range(2000))
    for task in ("Sort these", "Work out", "past tense", "backwards", "is not a", "How do I"):
        assert task in asked
