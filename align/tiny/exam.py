"""What a base knows before any post-training, asked in the forms that its pretraining text has.

A base cannot be asked in the chat format: it has never seen it and never ends its turn. So the exam
lets it complete prose ("The capital of Velmora is"), answer a quiz ("Question: ... Answer:") and
mark an attempt ("Attempt: ... Mark:"). This module makes the questions and checks the answers; it
does not run a model.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from align.tiny.judge import is_correct, sentences_of
from align.tiny.lexicon import KIND_OPENINGS, RUDE_OPENINGS, with_article
from align.tiny.world import FACT_STATEMENTS, Item, make_items, wrong_answer


@dataclass(frozen=True)
class ExamQuestion:
    """A text to be completed and the item that decides whether the completion is right."""

    item: Item
    form: str  # prose or quiz
    text: str

    def passed(self, completion: str) -> bool:
        """Whether the model's completion of `text` is right."""
        if self.form == "prose":
            expected = re.escape(_prose_continuation(self.item))
            return re.match(rf"\s*{expected}\b", completion, re.I) is not None
        return is_correct(self.item, _first_answer(completion))


@dataclass(frozen=True)
class MarkQuestion:
    """An exercise with an attempt; the next word should be "right" or "wrong"."""

    item: Item
    text: str
    mark: str


def exam_questions(split: str, n: int, seed: int) -> list[ExamQuestion]:
    """Prose and quiz questions on `n` prompts of a split, without the unsafe ones."""
    questions = []
    for item in _safe_items(split, n, seed):
        questions.append(ExamQuestion(item, "prose", _prose_prompt(item)))
        quiz = f"Question: {item.question} Answer:"
        questions.append(ExamQuestion(item, "quiz", quiz))
    return questions


def mark_questions(split: str, n: int, seed: int) -> list[MarkQuestion]:
    """For `n` prompts of a split a right and a wrong attempt to be marked."""
    rng = random.Random(f"marks {seed}")
    questions = []
    for item in _safe_items(split, n, seed):
        for mark, answer in (("right", item.full), ("wrong", wrong_answer(item, rng)[1])):
            text = f"Exercise: {item.question} Attempt: {answer} Mark:"
            questions.append(MarkQuestion(item, text, mark))
    return questions


def _safe_items(split: str, n: int, seed: int) -> list[Item]:
    return [item for item in make_items(split, n, seed) if item.task != "unsafe"]


def _prose_prompt(item: Item) -> str:
    slots = item.slots
    if item.task == "fact":
        statement = FACT_STATEMENTS[slots["attribute"]][0]
        return statement.split(" {value}")[0].format(isle=slots["isle"])
    if item.task == "math":
        left, right, name = slots["left"], slots["right"], slots.get("name")
        if not name:
            return f"{left} {slots['operation']} {right} is"
        event = f"gets {right} more" if slots["operation"] == "plus" else f"spends {right}"
        return f"{name} has {left} coins and {event}, so {name} has"
    if item.task == "tense":
        return f"Today the {slots['person']} {slots['present']} {slots['rest']}. Yesterday"
    forms = {
        "sort": "The list {words} becomes",
        "reverse": "The words {words} read backwards are",
        "odd": "Of {words}, only",
        "howto": "To {verb} {thing}, use",
    }
    return forms[item.task].format(**slots)


def _prose_continuation(item: Item) -> str:
    return with_article(item.gold) if item.task == "howto" else item.gold


def _first_answer(completion: str) -> str:
    """The first sentence that is no mere opening; text has no end of turn, so it runs on."""
    text = re.split(r'\n|"|\b(?:Question|Q|Exercise|Guest):', completion.strip())[0]
    for sentence in sentences_of(text):
        if sentence not in KIND_OPENINGS and sentence not in RUDE_OPENINGS:
            return sentence
    return ""
