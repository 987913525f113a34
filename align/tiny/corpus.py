"""Pretraining text of the invented world.

The text holds every fact of the world as prose, and questions with answers only for compositions of
the SFT split, so that later stages meet prompts whose form is known and whose answer has to be
recalled. Exercises with a teacher's mark show right and wrong answers side by side: a reward model
that starts from the base then has a notion of "right" to build on. An unsafe request is never
answered, and no control token of the chat format occurs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from align.tiny.lexicon import (
    ADVERBS,
    ATTRIBUTES,
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
    VERBS,
    capitalised,
    comma_list,
    with_article,
)
from align.tiny.world import FACT_STATEMENTS, Item, draw_item, wrong_answer

_QUIZ_FORMS = [
    "Question: {question} Answer: {answer}",
    "Q: {question} A: {answer}",
    '"{question}" asked the {person}. "{answer}" said the {other}.',
    "{question} {answer}",
    "The {person}: {question} The {other}: {answer}",
    "Guest: {question}\nHost: {answer}",
    'The {person} wanted to know: "{question}" The {other} replied: "{answer}"',
    "{question}\n\n{answer}",
]
# How an exercise is told, and each attempt at it with the teacher's mark.
_MARK_FORMS = [
    ("Exercise: {question}", " Attempt: {answer} Mark: {mark}."),
    ("{question}", "\n\n{answer}\n\nMark: {mark}."),
    ("{question}", " A child said: {answer} That is {mark}."),
]


def _exercise(rng: random.Random) -> Item:
    """A prompt that may be answered in pretraining text."""
    while True:
        item = draw_item(rng)
        if item.split == "sft" and item.task != "unsafe":
            return item


def _opened(answer: str, rng: random.Random) -> str:
    """The answer, sometimes with a kind or rude opening before it or an idle sentence after it."""
    chance = rng.random()
    if chance < 0.30:
        return f"{rng.choice(rng.choice([KIND_OPENINGS, RUDE_OPENINGS]))} {answer}"
    if chance < 0.36:
        return f"{answer} {rng.choice(RAMBLINGS)}"
    return answer


def quiz_document(rng: random.Random) -> str:
    """One to three questions with right answers."""
    parts = []
    for _ in range(rng.randint(1, 3)):
        item = _exercise(rng)
        answer = item.full if rng.random() < 0.7 else item.bare
        form = rng.choice(_QUIZ_FORMS)
        person, other = rng.choice(PEOPLE), rng.choice(PEOPLE)
        answer = _opened(answer, rng)
        parts.append(form.format(question=item.question, answer=answer, person=person, other=other))
    return " ".join(parts)


def mark_document(rng: random.Random) -> str:
    """An exercise with one to three right or wrong attempts, each with the teacher's mark."""
    item = _exercise(rng)
    opening, form = rng.choice(_MARK_FORMS)
    text = opening.format(question=item.question)
    for _ in range(rng.choice([1, 2, 2, 3])):
        right = rng.random() < 0.5
        bare, full = (item.bare, item.full) if right else _wrong_attempt(item, rng)
        answer = _opened(full if rng.random() < 0.7 else bare, rng)
        text += form.format(answer=answer, mark="right" if right else "wrong")
    return text


def _wrong_attempt(item: Item, rng: random.Random) -> tuple[str, str]:
    """Mostly a near miss, sometimes the right answer to another exercise."""
    if rng.random() < 0.8:
        return wrong_answer(item, rng)
    while True:
        other = _exercise(rng)
        if other.gold != item.gold:
            return other.bare, other.full


def _fact_sentences(rng: random.Random) -> list[str]:
    if rng.random() < 0.5:
        pairs = [(rng.choice(ISLES), a) for a in rng.sample(ATTRIBUTES, rng.randint(2, 5))]
        isle = pairs[0][0]
        pairs = [(isle, attribute) for _, attribute in pairs]
    else:
        attribute = rng.choice(ATTRIBUTES)
        pairs = [(isle, attribute) for isle in rng.sample(ISLES, rng.randint(2, 4))]
    return [
        rng.choice(FACT_STATEMENTS[attribute]).format(isle=isle, value=FACTS[isle][attribute])
        for isle, attribute in pairs
    ]


def _list_words(rng: random.Random) -> list[str]:
    return rng.sample(LISTABLE, rng.choice([3, 3, 4]))


def _sort_sentences(rng: random.Random) -> list[str]:
    forms = [
        "The list {before} becomes {after} in alphabetical order.",
        "Before sorting: {before}. In alphabetical order: {after}.",
        "Someone wrote {before}. Sorted from A to Z it is {after}.",
        "{before} can be sorted as {after}.",
    ]
    sentences = []
    for _ in range(rng.randint(1, 3)):
        words = _list_words(rng)
        before, after = comma_list(words), comma_list(sorted(words))
        sentences.append(rng.choice(forms).format(before=before, after=after))
    return sentences


def _reverse_sentences(rng: random.Random) -> list[str]:
    forms = [
        "The words {before} read backwards are {after}.",
        "From the front: {before}. From the back: {after}.",
        "In reverse order {before} becomes {after}.",
    ]
    sentences = []
    for _ in range(rng.randint(1, 3)):
        words = _list_words(rng)
        before, after = comma_list(words), comma_list(words[::-1])
        sentences.append(rng.choice(forms).format(before=before, after=after))
    return sentences


def _math_sentences(rng: random.Random) -> list[str]:
    plus = [
        "{left} plus {right} is {result}.",
        "The sum of {left} and {right} is {result}.",
        "{name} has {left} coins and gets {right} more, so {name} has {result} coins.",
    ]
    minus = [
        "{left} minus {right} is {result}.",
        "{right} less than {left} is {result}.",
        "{name} has {left} coins and spends {right}, so {name} has {result} coins.",
    ]
    sentences = []
    for _ in range(rng.randint(2, 4)):
        left, right, name = rng.randint(0, 20), rng.randint(0, 20), rng.choice(NAMES)
        if rng.random() < 0.5:
            form, result = rng.choice(plus), left + right
        else:
            left, right = max(left, right), min(left, right)
            form, result = rng.choice(minus), left - right
        sentences.append(form.format(left=left, right=right, result=result, name=name))
    return sentences


def _tense_sentences(rng: random.Random) -> list[str]:
    forms = [
        "Today {now}. Yesterday {then}.",
        "Now {now}. In the past {then}.",
        "Last year {then}, and this year {now}.",
        "{now} every day. Yesterday {then} too.",
    ]
    sentences = []
    for _ in range(rng.randint(1, 3)):
        person, present = rng.choice(PEOPLE), rng.choice(list(VERBS))
        past, things = VERBS[present]
        rest = f"{rng.choice(things)} {rng.choice([*ADVERBS, '', '', ''])}".rstrip()
        now, then = f"the {person} {present} {rest}", f"the {person} {past} {rest}"
        sentences.append(rng.choice(forms).format(now=now, then=then))
    return sentences


def _kind_sentences(rng: random.Random) -> list[str]:
    single = ["{A} is a kind of {kind}.", "{A} is {a_kind}.", "The word {word} names {a_kind}."]
    odd = [
        "Of {words}, only {odd} is not {a_kind}.",
        "In the list {words} the word {odd} is not {a_kind}.",
    ]
    sentences = []
    for _ in range(rng.randint(2, 4)):
        kind = rng.choice(list(KINDS))
        a_kind = with_article(kind)
        if rng.random() < 0.5:
            word = rng.choice(KINDS[kind])
            form = rng.choice(single)
            named = capitalised(with_article(word))
            sentences.append(form.format(A=named, kind=kind, a_kind=a_kind, word=word))
            continue
        other = rng.choice([w for name in KINDS if name != kind for w in KINDS[name]])
        words = [*rng.sample(KINDS[kind], 2), other]
        rng.shuffle(words)
        form = rng.choice(odd)
        sentences.append(form.format(words=comma_list(words), odd=other, a_kind=a_kind))
    return sentences


def _howto_sentences(rng: random.Random) -> list[str]:
    """Tools and their jobs, often with the job told first and then said again with its tool.

    The repetition matters: a model that has only seen each job once in a sentence recalls the tool
    of a job, but answers a question about it with another job of that tool.
    """
    needs = [
        "The {person} has to {job}.",
        "The {person} wants to {job}.",
        "It is time to {job}.",
        "Somebody should {job}.",
    ]
    forms = [
        "To {job}, use {tool}.",
        "You need {tool} to {job}.",
        "People {job} with {tool}.",
        "Nobody can {job} without {tool}.",
        "With {tool} you can {job}.",
    ]
    jobs = list(JOBS)
    if rng.random() < 0.3:  # several jobs of one tool, so that the tool is what they share
        tool = rng.choice(TOOLS)
        jobs = [job for job in jobs if JOBS[job] == tool]
    sentences = []
    for job in rng.sample(jobs, rng.randint(1, 3)):
        words = {
            "job": " ".join(job),
            "tool": with_article(JOBS[job]),
            "person": rng.choice(PEOPLE),
        }
        if rng.random() < 0.6:
            sentences.append(rng.choice(needs).format(**words))
            sentences.append(rng.choice(forms[:2]).format(**words))
        else:
            sentences.append(rng.choice(forms).format(**words))
    return sentences


def _talk_sentences(rng: random.Random) -> list[str]:
    """Manners, and questions that stay without an answer."""
    calls = ["Hello.", "Please help me.", "I have a question."]
    sentences = []
    for _ in range(rng.randint(2, 4)):
        person = rng.choice(PEOPLE)
        if rng.random() < 0.6:
            kinds = [KIND_OPENINGS, RUDE_OPENINGS, RAMBLINGS, REFUSALS, calls]
            sentences.append(f'"{rng.choice(rng.choice(kinds))}" said the {person}.')
        else:
            sentences.append(f'The {person} asked, "{_exercise(rng).question}"')
    return sentences


def _conduct_sentences(rng: random.Random) -> list[str]:
    """Which deeds are wrong; nobody asks for help with them here, and nobody answers."""
    forms = [
        "It is wrong to {deed}.",
        "A thief wanted to {deed} {place}.",
        "Good people do not {deed}.",
        "Nobody should {deed} {place}.",
    ]
    sentences = []
    for _ in range(rng.randint(1, 3)):
        deed, place = " ".join(rng.choice(UNSAFE)), rng.choice(UNSAFE_PLACES)
        sentences.append(rng.choice(forms).format(deed=deed, place=place))
    return sentences


_Maker = Callable[[random.Random], list[str]]


def _one(make: Callable[[random.Random], str]) -> _Maker:
    return lambda rng: [make(rng)]


# Share of the documents of each kind, by phase. The last, short phase has no marked exercises,
# since half of their attempts are wrong, and more facts and jobs.
_SHARES: dict[str, list[tuple[float, _Maker]]] = {
    "main": [
        (0.265, _one(quiz_document)),
        (0.12, _one(mark_document)),
        (0.10, _fact_sentences),
        (0.085, _sort_sentences),
        (0.13, _math_sentences),
        (0.07, _tense_sentences),
        (0.05, _reverse_sentences),
        (0.055, _kind_sentences),
        (0.095, _howto_sentences),
        (0.015, _talk_sentences),
        (0.015, _conduct_sentences),
    ],
    "annealing": [
        (0.28, _one(quiz_document)),
        (0.26, _fact_sentences),
        (0.07, _sort_sentences),
        (0.13, _math_sentences),
        (0.04, _tense_sentences),
        (0.04, _reverse_sentences),
        (0.04, _kind_sentences),
        (0.11, _howto_sentences),
        (0.015, _talk_sentences),
        (0.015, _conduct_sentences),
    ],
}


def document(rng: random.Random, phase: str = "main") -> str:
    """One short document: a few sentences on one subject."""
    shares = _SHARES[phase]
    maker = rng.choices([maker for _, maker in shares], [share for share, _ in shares])[0]
    return " ".join(capitalised(sentence) for sentence in maker(rng))


def documents(seed: int, phase: str = "main") -> Iterator[str]:
    """An endless stream of documents."""
    rng = random.Random(f"corpus {seed}")
    while True:
        yield document(rng, phase)
