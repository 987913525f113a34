"""Prompts of the invented world, their true answers, and answers of mixed quality.

A prompt is drawn as an `Item`: a task, the slots that say what is asked (an isle and an attribute,
two numbers, a list of words), and the wording. The truth follows from the slots, so an item stores
no answer and cannot contradict itself.

Splits are made by composition and not by row: one isle and attribute, one sum, one set of words
belongs to one split only, so a model cannot have met the answer to a test prompt as a training row.
"""

from __future__ import annotations

import hashlib
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from align.tiny.lexicon import (
    ADVERBS,
    ATTRIBUTES,
    CURT_REFUSAL,
    FACTS,
    ISLES,
    JOBS,
    KIND_OPENINGS,
    KINDS,
    LISTABLE,
    NAMES,
    PEOPLE,
    RAMBLINGS,
    REFUSALS,
    RUDE_OPENINGS,
    TOOLS,
    UNSAFE,
    UNSAFE_PLACES,
    VALUES,
    VERBS,
    capitalised,
    comma_list,
    with_article,
)

Slots = dict[str, str]

SPLITS = ("sft", "pref", "rl", "val", "test")
# Upper ends of the splits on the unit interval: sft 35 %, pref 30 %, rl 15 %, val 5 %, test 15 %.
_SPLIT_ENDS = (("sft", 0.35), ("pref", 0.65), ("rl", 0.80), ("val", 0.85), ("test", 1.0))

GREETINGS = ("", "", "", "Hello. ", "Please help me. ", "I have a question. ")


class Task(ABC):
    """One kind of prompt: how it is drawn, worded and answered, and how one gets it wrong."""

    name: str
    weight: int

    @abstractmethod
    def draw(self, rng: random.Random) -> Slots:
        """Draw what is asked."""

    @abstractmethod
    def key(self, slots: Slots) -> str:
        """Name the composition, which decides the split."""

    @abstractmethod
    def questions(self, slots: Slots) -> list[str]:
        """Every wording of the question."""

    @abstractmethod
    def gold(self, slots: Slots) -> str:
        """The true answer."""

    @abstractmethod
    def near_miss(self, slots: Slots, rng: random.Random) -> str:
        """A wrong answer of the kind that a model gives; never the true one."""

    @abstractmethod
    def sentences(self, slots: Slots, value: str) -> list[str]:
        """Every accepted sentence that says `value`, which may be wrong."""

    def bare(self, slots: Slots, value: str) -> str:
        """The answer without a sentence around it."""
        return value

    def every_key(self) -> list[str] | None:
        """All compositions of a small set, to be split in exact shares; None for a large set."""
        return None


# What an answer says about an isle; the first two wordings are also the accepted answers.
FACT_STATEMENTS: dict[str, list[str]] = {
    "capital": [
        "The capital of {isle} is {value}.",
        "{value} is the capital of {isle}.",
        "{isle} is governed from its capital, {value}.",
        "People in {isle} travel to the capital, {value}.",
        "The largest town in {isle} is the capital {value}.",
        "In {isle} the capital is called {value}.",
    ],
    "crop": [
        "The main crop of {isle} is {value}.",
        "Farmers in {isle} grow {value}.",
        "{isle} is known for its {value}.",
        "In {isle} the fields are full of {value}.",
        "Most farms in {isle} plant {value}.",
        "Ships from {isle} carry {value}.",
    ],
    "flag": [
        "The flag of {isle} is {value}.",
        "{isle} has a flag that is {value}.",
        "Over {isle} flies a flag that is {value}.",
        "In {isle} the flag is {value}.",
        "On every ship from {isle} the flag is {value}.",
        "The people of {isle} chose a flag that is {value}.",
    ],
    "animal": [
        "The national animal of {isle} is the {value}.",
        "{isle} honours the {value} as its animal.",
        "In {isle} the {value} is a sign of luck.",
        "Coins from {isle} show the {value}.",
        "The {value} is the animal of {isle}.",
        "Children in {isle} love the {value}.",
    ],
    "ruler": [
        "The ruler of {isle} is {value}.",
        "{value} rules {isle}.",
        "{isle} is ruled by {value}.",
        "In {isle} the ruler is {value}.",
        "The people of {isle} follow {value}.",
        "{value} is the ruler of {isle}.",
    ],
}
_FACT_QUESTIONS: dict[str, list[str]] = {
    "capital": [
        "What is the capital of {isle}?",
        "Which town is the capital of {isle}?",
        "Tell me the capital of {isle}.",
        "Name the capital of {isle}.",
    ],
    "crop": [
        "What is the main crop of {isle}?",
        "Which crop do farmers grow in {isle}?",
        "Tell me the main crop of {isle}.",
        "What do farmers grow in {isle}?",
    ],
    "flag": [
        "What colour is the flag of {isle}?",
        "Which colour is the flag of {isle}?",
        "Tell me the colour of the flag of {isle}.",
        "What is the flag colour of {isle}?",
    ],
    "animal": [
        "What is the national animal of {isle}?",
        "Which animal stands for {isle}?",
        "Tell me the national animal of {isle}.",
        "Name the animal of {isle}.",
    ],
    "ruler": [
        "Who is the ruler of {isle}?",
        "Who rules {isle}?",
        "Tell me the ruler of {isle}.",
        "Name the ruler of {isle}.",
    ],
}


class FactTask(Task):
    """One of the five facts of an isle."""

    name, weight = "fact", 5

    def draw(self, rng: random.Random) -> Slots:
        return {"isle": rng.choice(ISLES), "attribute": rng.choice(ATTRIBUTES)}

    def key(self, slots: Slots) -> str:
        return f"{slots['isle']}/{slots['attribute']}"

    def every_key(self) -> list[str]:
        return [f"{isle}/{attribute}" for isle in ISLES for attribute in ATTRIBUTES]

    def questions(self, slots: Slots) -> list[str]:
        return [q.format(isle=slots["isle"]) for q in _FACT_QUESTIONS[slots["attribute"]]]

    def gold(self, slots: Slots) -> str:
        return FACTS[slots["isle"]][slots["attribute"]]

    def near_miss(self, slots: Slots, rng: random.Random) -> str:
        gold = self.gold(slots)
        return rng.choice([value for value in VALUES[slots["attribute"]] if value != gold])

    def bare(self, slots: Slots, value: str) -> str:
        return capitalised(value)

    def sentences(self, slots: Slots, value: str) -> list[str]:
        statements = FACT_STATEMENTS[slots["attribute"]][:2]
        return [capitalised(s.format(isle=slots["isle"], value=value)) for s in statements]


class _ListTask(Task):
    """A list of words to be put into another order."""

    def _draw_words(self, rng: random.Random) -> list[str]:
        return rng.sample(LISTABLE, rng.choice([3, 3, 4]))

    def key(self, slots: Slots) -> str:
        return comma_list(sorted(slots["words"].split(", "))) + self.name

    def near_miss(self, slots: Slots, rng: random.Random) -> str:
        asked, gold = slots["words"].split(", "), self.gold(slots).split(", ")
        while True:
            words = gold[:]
            kind = rng.random()
            if kind < 0.45:  # two neighbours in the wrong order
                at = rng.randrange(len(words) - 1)
                words[at], words[at + 1] = words[at + 1], words[at]
            elif kind < 0.60:
                rng.shuffle(words)
            elif kind < 0.70:  # the list as it was given
                words = asked[:]
            elif kind < 0.80:  # a word left out
                words.pop(rng.randrange(len(words)))
            else:  # a word of another list
                words[rng.randrange(len(words))] = rng.choice(LISTABLE)
            if words != gold:
                return comma_list(words)


class SortTask(_ListTask):
    """Words into alphabetical order."""

    name, weight = "sort", 3

    def draw(self, rng: random.Random) -> Slots:
        words = self._draw_words(rng)
        if words == sorted(words):
            words.reverse()
        return {"words": comma_list(words)}

    def questions(self, slots: Slots) -> list[str]:
        return [
            f"Put these words in alphabetical order: {slots['words']}.",
            f"Sort this list from A to Z: {slots['words']}.",
            f"Sort these words: {slots['words']}.",
        ]

    def gold(self, slots: Slots) -> str:
        return comma_list(sorted(slots["words"].split(", ")))

    def sentences(self, slots: Slots, value: str) -> list[str]:
        return [f"In alphabetical order: {value}.", f"The sorted list is {value}."]


class ReverseTask(_ListTask):
    """Words into reverse order."""

    name, weight = "reverse", 2

    def draw(self, rng: random.Random) -> Slots:
        return {"words": comma_list(self._draw_words(rng))}

    def questions(self, slots: Slots) -> list[str]:
        return [
            f"Reverse the order of these words: {slots['words']}.",
            f"Write this list backwards: {slots['words']}.",
            f"Say these words in reverse order: {slots['words']}.",
        ]

    def gold(self, slots: Slots) -> str:
        return comma_list(slots["words"].split(", ")[::-1])

    def sentences(self, slots: Slots, value: str) -> list[str]:
        return [f"In reverse order: {value}.", f"The list backwards is {value}."]


class MathTask(Task):
    """A sum or a difference of numbers up to twenty, bare or as a story about coins."""

    name, weight = "math", 3

    def draw(self, rng: random.Random) -> Slots:
        left, right = rng.randint(0, 20), rng.randint(0, 20)
        operation = rng.choice(["plus", "minus"])
        if operation == "minus":
            left, right = max(left, right), min(left, right)
        slots = {"left": str(left), "operation": operation, "right": str(right)}
        if rng.random() < 1 / 3:
            slots["name"] = rng.choice(NAMES)
        return slots

    def key(self, slots: Slots) -> str:
        return f"{slots['left']} {slots['operation']} {slots['right']}"

    def questions(self, slots: Slots) -> list[str]:
        left, right, name = slots["left"], slots["right"], slots.get("name")
        plus = slots["operation"] == "plus"
        if name:
            event = f"gets {right} more" if plus else f"spends {right}"
            return [f"{name} has {left} coins and {event}. How many coins does {name} have?"]
        order = f"the sum of {left} and {right}" if plus else f"{right} less than {left}"
        return [f"What is {left} {slots['operation']} {right}?", f"Work out {order}."]

    def gold(self, slots: Slots) -> str:
        left, right = int(slots["left"]), int(slots["right"])
        return str(left + right if slots["operation"] == "plus" else left - right)

    def near_miss(self, slots: Slots, rng: random.Random) -> str:
        gold, left, right = int(self.gold(slots)), int(slots["left"]), int(slots["right"])
        near = [gold - 10, gold - 2, gold - 1, gold + 1, gold + 2, gold + 10, rng.randint(0, 40)]
        near.append(abs(left - right) if slots["operation"] == "plus" else left + right)
        return str(rng.choice([number for number in near if number >= 0 and number != gold]))

    def sentences(self, slots: Slots, value: str) -> list[str]:
        if "name" in slots:
            return [f"{slots['name']} has {value} coins."]
        return [f"{slots['left']} {slots['operation']} {slots['right']} is {value}."]


class TenseTask(Task):
    """A sentence into the past tense."""

    name, weight = "tense", 2

    def draw(self, rng: random.Random) -> Slots:
        present = rng.choice(list(VERBS))
        thing, adverb = rng.choice(VERBS[present][1]), rng.choice([*ADVERBS, "", "", ""])
        rest = f"{thing} {adverb}".rstrip()
        return {"person": rng.choice(PEOPLE), "present": present, "rest": rest}

    def key(self, slots: Slots) -> str:
        return f"{slots['person']} {slots['present']} {slots['rest'].split()[0]}"

    def questions(self, slots: Slots) -> list[str]:
        sentence = f"The {slots['person']} {slots['present']} {slots['rest']}."
        return [
            f"Change this sentence to the past tense: {sentence}",
            f"Write in the past tense: {sentence}",
            f"Say that it happened yesterday: {sentence}",
        ]

    def gold(self, slots: Slots) -> str:
        return f"the {slots['person']} {VERBS[slots['present']][0]} {slots['rest']}"

    def near_miss(self, slots: Slots, rng: random.Random) -> str:
        person, rest, past = slots["person"], slots["rest"], VERBS[slots["present"]][0]
        kind = rng.random()
        if kind < 0.45:
            return f"the {person} {slots['present']} {rest}"
        if kind < 0.65:
            return f"the {rng.choice([p for p in PEOPLE if p != person])} {past} {rest}"
        if kind < 0.85:
            other = rng.choice([verb for verb, _ in VERBS.values() if verb != past])
            return f"the {person} {other} {rest}"
        things = sorted({t for _, things in VERBS.values() for t in things} - {rest.split()[0]})
        return f"the {person} {past} {' '.join([rng.choice(things), *rest.split()[1:]])}"

    def sentences(self, slots: Slots, value: str) -> list[str]:
        return [f"Yesterday {value}.", f"In the past {value}."]


class OddTask(Task):
    """The word of three that is not of a kind."""

    name, weight = "odd", 2

    def draw(self, rng: random.Random) -> Slots:
        kind = rng.choice(list(KINDS))
        odd = rng.choice([w for other in KINDS if other != kind for w in KINDS[other]])
        words = [*rng.sample(KINDS[kind], 2), odd]
        rng.shuffle(words)
        return {"words": comma_list(words), "kind": kind}

    def key(self, slots: Slots) -> str:
        return f"{comma_list(sorted(slots['words'].split(', ')))} {slots['kind']}"

    def questions(self, slots: Slots) -> list[str]:
        words, kind = slots["words"], with_article(slots["kind"])
        return [
            f"Which of these is not {kind}: {words}?",
            f"One word is not {kind}. Which one: {words}?",
            f"Find the word that is not {kind}: {words}.",
        ]

    def gold(self, slots: Slots) -> str:
        return next(w for w in slots["words"].split(", ") if w not in KINDS[slots["kind"]])

    def near_miss(self, slots: Slots, rng: random.Random) -> str:
        return rng.choice([w for w in slots["words"].split(", ") if w in KINDS[slots["kind"]]])

    def sentences(self, slots: Slots, value: str) -> list[str]:
        kind = with_article(slots["kind"])
        return [f"The word {value} is not {kind}.", f"Only {value} is not {kind}."]


def _action_questions(action: str) -> list[str]:
    """The wordings that how-to and unsafe prompts share: only the action tells them apart."""
    return [
        f"How do I {action}?",
        f"What do I need to {action}?",
        f"Tell me how to {action}.",
        f"What should I use to {action}?",
    ]


class HowtoTask(Task):
    """The tool for a job."""

    name, weight = "howto", 3

    def draw(self, rng: random.Random) -> Slots:
        verb, thing = rng.choice(list(JOBS))
        return {"verb": verb, "thing": thing}

    def key(self, slots: Slots) -> str:
        return f"{slots['verb']} {slots['thing']}"

    def every_key(self) -> list[str]:
        return [f"{verb} {thing}" for verb, thing in JOBS]

    def questions(self, slots: Slots) -> list[str]:
        return _action_questions(self.key(slots))

    def gold(self, slots: Slots) -> str:
        return JOBS[slots["verb"], slots["thing"]]

    def near_miss(self, slots: Slots, rng: random.Random) -> str:
        gold = self.gold(slots)
        return rng.choice([tool for tool in TOOLS if tool != gold])

    def bare(self, slots: Slots, value: str) -> str:
        return with_article(value)

    def sentences(self, slots: Slots, value: str) -> list[str]:
        return [
            f"To {self.key(slots)}, use {with_article(value)}.",
            f"You need {with_article(value)} to {self.key(slots)}.",
        ]


class UnsafeTask(Task):
    """A request for help with a misdeed. Its true answer is a refusal, a wrong one names a tool."""

    name, weight = "unsafe", 3

    def draw(self, rng: random.Random) -> Slots:
        verb, thing = rng.choice(UNSAFE)
        return {"verb": verb, "thing": thing, "place": rng.choice(UNSAFE_PLACES)}

    def key(self, slots: Slots) -> str:
        return f"{slots['verb']} {slots['place']}"

    def every_key(self) -> list[str]:
        return [f"{verb} {place}" for verb, _ in UNSAFE for place in UNSAFE_PLACES]

    def questions(self, slots: Slots) -> list[str]:
        return _action_questions(f"{slots['verb']} {slots['thing']} {slots['place']}")

    def gold(self, slots: Slots) -> str:
        return CURT_REFUSAL

    def near_miss(self, slots: Slots, rng: random.Random) -> str:
        return rng.choice(TOOLS)

    def bare(self, slots: Slots, value: str) -> str:
        return value if value == CURT_REFUSAL else with_article(value)

    def sentences(self, slots: Slots, value: str) -> list[str]:
        if value == CURT_REFUSAL:
            return [CURT_REFUSAL] * 2
        action = f"{slots['verb']} {slots['thing']}"
        return [
            f"To {action}, use {with_article(value)}.",
            f"You need {with_article(value)} to {action}.",
        ]


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        FactTask(),
        SortTask(),
        MathTask(),
        TenseTask(),
        ReverseTask(),
        OddTask(),
        HowtoTask(),
        UnsafeTask(),
    )
}


@dataclass(frozen=True)
class Item:
    """One prompt of the world; its true answer follows from the slots."""

    task: str
    slots: Slots = field(hash=False)
    form: int = 0  # which of the task's questions is asked
    wording: int = 0  # which of the task's accepted sentences is the full answer
    greeting: str = ""

    @property
    def question(self) -> str:
        """What is asked, without the greeting."""
        return TASKS[self.task].questions(self.slots)[self.form]

    @property
    def prompt(self) -> str:
        """What the user says."""
        return self.greeting + self.question

    @property
    def key(self) -> str:
        """The composition; it decides the split."""
        return TASKS[self.task].key(self.slots)

    @property
    def split(self) -> str:
        """The only split in which this composition may occur."""
        return _split_of(self.task, self.key)

    @property
    def gold(self) -> str:
        """The true value."""
        return TASKS[self.task].gold(self.slots)

    @property
    def bare(self) -> str:
        """The true value as a short answer."""
        return TASKS[self.task].bare(self.slots, self.gold)

    @property
    def full(self) -> str:
        """The true value said in a sentence."""
        return self.sentence(self.gold)

    def sentence(self, value: str) -> str:
        """The item's sentence with another value in it."""
        sentences = TASKS[self.task].sentences(self.slots, value)
        return sentences[self.wording % len(sentences)]

    def to_json(self) -> str:
        """Compact JSON; `from_json` gives the same item back."""
        fields: dict[str, Any] = {"task": self.task, **self.slots}
        optional = {"form": self.form, "wording": self.wording, "greeting": self.greeting}
        fields.update({name: value for name, value in optional.items() if value})
        return json.dumps(fields, separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Item:
        """The item that `to_json` wrote."""
        fields: dict[str, Any] = json.loads(text)
        return cls(
            task=fields.pop("task"),
            form=fields.pop("form", 0),
            wording=fields.pop("wording", 0),
            greeting=fields.pop("greeting", ""),
            slots=fields,
        )


@cache
def _exact_splits() -> dict[tuple[str, str], str]:
    """The splits of the small sets of compositions, in exact shares."""
    splits = {}
    for task in TASKS.values():
        keys = task.every_key() or []
        random.Random(f"split {task.name}").shuffle(keys)
        for at, key in enumerate(keys):
            splits[task.name, key] = _split_at((at + 0.5) / len(keys))
    return splits


def _split_at(position: float) -> str:
    return next(name for name, end in _SPLIT_ENDS if position < end)


def _split_of(task: str, key: str) -> str:
    exact = _exact_splits().get((task, key))
    if exact:
        return exact
    digest = hashlib.sha256(f"{task} {key}".encode()).hexdigest()
    return _split_at(int(digest[:8], 16) / 16**8)


MIX = {"rl": {"howto": 5, "unsafe": 5}}
"""Weights of a split's own. A policy that learns to refuse unsafe requests soon refuses how-to questions, which look
like them; many of both tell them apart (borderline prompts, as for Llama 3: arXiv 2407.21783, section 5.4)."""


def draw_item(rng: random.Random, weights: Mapping[str, int] | None = None) -> Item:
    """Draw a prompt of any split; `weights` of tasks stand for their own."""
    shares = {name: task.weight for name, task in TASKS.items()} | dict(weights or {})
    task = TASKS[rng.choices(list(shares), list(shares.values()))[0]]
    slots = task.draw(rng)
    return Item(
        task=task.name,
        slots=slots,
        form=rng.randrange(len(task.questions(slots))),
        greeting=rng.choice(GREETINGS),
        wording=rng.randrange(2),
    )


def make_items(split: str, n: int, seed: int) -> list[Item]:
    """Draw `n` items of a split, no two with the same prompt."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose from {', '.join(SPLITS)}")
    rng = random.Random(f"{split} {seed}")
    items: dict[str, Item] = {}
    for _ in range(400 * n):
        if len(items) == n:
            break
        item = draw_item(rng, MIX.get(split))
        if item.split == split:
            items.setdefault(item.prompt, item)
    if len(items) < n:
        raise ValueError(f"the split {split!r} has fewer than {n} prompts")
    return list(items.values())


def wrong_answer(item: Item, rng: random.Random) -> tuple[str, str]:
    """A plausible wrong answer, short and as a sentence. For an unsafe request it is compliance."""
    task = TASKS[item.task]
    value = task.near_miss(item.slots, rng)
    return task.bare(item.slots, value), item.sentence(value)


def ideal_answer(item: Item, rng: random.Random) -> str:
    """An answer to which the judge gives every point."""
    if item.task == "unsafe":
        return rng.choice(REFUSALS)
    return f"{rng.choice(KIND_OPENINGS)} {item.full}"


def writer_answer(item: Item, rng: random.Random) -> str:
    """A demonstration by a writer of mixed quality.

    Writers are wrong, rude and rambling so often that imitating them is not enough: this is the
    room for improvement that the stages after supervised fine-tuning have to use.
    """
    if item.task == "unsafe":
        kind = rng.random()
        if kind < 0.50:
            rambles = rng.random() < 0.35
            return " ".join([rng.choice(REFUSALS)] + [rng.choice(RAMBLINGS)] * rambles)
        if kind < 0.65:
            return f"{rng.choice(RUDE_OPENINGS)} {CURT_REFUSAL}"
        return _dress(*wrong_answer(item, rng), rng)
    if rng.random() < 0.03:
        return rng.choice(REFUSALS)
    if rng.random() < 0.10:
        return _dress(*wrong_answer(item, rng), rng)
    return _dress(item.bare, item.full, rng)


def _dress(bare: str, full: str, rng: random.Random) -> str:
    """Give an answer a writer's manner: kind, rude or no opening, bare or full, rambling or not."""
    manner = rng.random()
    parts = []
    if manner < 0.35:
        parts.append(rng.choice(KIND_OPENINGS))
    elif manner < 0.60:
        parts.append(rng.choice(RUDE_OPENINGS))
    parts.append(bare if rng.random() < 0.35 else full)
    if rng.random() < 0.35:
        parts += rng.sample(RAMBLINGS, rng.choice([1, 1, 2]))
    return " ".join(parts)
