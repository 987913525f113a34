"""The words and the facts of the invented world.

Everything here is a constant, built once from fixed seeds: forty isles with five facts each, the
tools and their jobs, requests that have to be refused, and the phrases with which people open,
pad and refuse an answer. Nothing depends on a data seed, so the world is the same in every run.
"""

from __future__ import annotations

import random

ISLE_COUNT = 40


def _words(text: str) -> list[str]:
    return text.split()


_SYLLABLES_FIRST = _words(
    "Vel Tar Mor Bri Osk Lun Fen Gal Hes Ith Jor Kel Nam Orr Pel Quin Rus Sil Tol Ush Wex Yar Zan "
    "Dro Cal Eld"
)
_SYLLABLES_LAST = _words("mora nik ven dale ost ria une ack wyn eth ora ish ume and ell")

ANIMALS = _words("fox owl bear deer hare wolf goat swan crow seal otter badger hawk horse")
CROPS = _words("barley rye oats beans corn rice flax hops peas cotton tea wheat")
COLOURS = _words("red blue green white black yellow purple orange brown grey")
FRUITS = _words("apple plum pear fig grape lemon cherry melon peach quince")
TOOLS = _words("hammer saw needle spade knife broom ladder rope brush axe")
METALS = _words("iron gold tin copper silver lead zinc nickel steel brass")
TREES = _words("oak elm pine birch maple cedar willow ash yew alder")

# Kinds of things, for the task that asks for the odd one out.
KINDS: dict[str, list[str]] = {
    "animal": ANIMALS,
    "fruit": FRUITS,
    "tool": TOOLS,
    "metal": METALS,
    "tree": TREES,
    "crop": CROPS,
}
LISTABLE: list[str] = sorted(word for words in KINDS.values() for word in words)

PEOPLE = _words("cook baker farmer sailor tailor miller smith weaver hunter potter painter singer")
NAMES = _words("Odda Brun Mira Tovi Lena Pask Runa Felk Ansa Dorn Edda Garo Hilm Ivo Jula Kasp")
ADVERBS = _words("slowly gladly quietly quickly carefully well")

# Present form -> (past form, things that this is done to).
VERBS: dict[str, tuple[str, list[str]]] = {
    "bakes": ("baked", ["bread", "pies", "cakes"]),
    "paints": ("painted", ["doors", "walls", "boats"]),
    "carries": ("carried", ["stones", "baskets", "water"]),
    "cleans": ("cleaned", ["floors", "pots", "boots"]),
    "mends": ("mended", ["nets", "roofs", "shoes"]),
    "washes": ("washed", ["plates", "shirts", "carts"]),
    "makes": ("made", ["candles", "chairs", "ropes"]),
    "sells": ("sold", ["eggs", "honey", "cloth"]),
    "buys": ("bought", ["salt", "wool", "milk"]),
    "brings": ("brought", ["wood", "letters", "hay"]),
    "finds": ("found", ["shells", "coins", "keys"]),
    "builds": ("built", ["walls", "barns", "bridges"]),
    "draws": ("drew", ["maps", "birds", "ships"]),
    "writes": ("wrote", ["letters", "songs", "books"]),
    "keeps": ("kept", ["bees", "hens", "sheep"]),
    "counts": ("counted", ["coins", "sheep", "eggs"]),
}

# Tool -> its jobs. Most verbs belong to one tool and a few (trim, clear, clean, mend, paint, split,
# fix, pull) to several, so that a job is mostly, but not always, known by its verb.
_JOBS_OF_TOOL = {
    "saw": (
        "cut:wood, cut:a beam, cut:a pipe, cut:the boards, shorten:a post, shorten:a pole, "
        "shorten:the legs, trim:a plank, trim:a branch, split:a board, halve:a log, halve:the "
        "timber"
    ),
    "axe": (
        "chop:a stump, chop:the firewood, chop:a trunk, fell:a tree, fell:an oak, fell:the "
        "pines, hew:a post, hew:a beam, split:a log, split:the kindling, clear:the thicket, "
        "clear:the saplings"
    ),
    "spade": (
        "dig:a hole, dig:a ditch, dig:a well, dig:the garden, bury:a bone, bury:a chest, "
        "bury:the seeds, plant:a bush, plant:a rose, plant:the cabbage, turn:the soil, "
        "clear:the mud"
    ),
    "broom": (
        "sweep:the floor, sweep:the stairs, sweep:the porch, sweep:the hall, tidy:the barn, "
        "tidy:the stable, tidy:the kitchen, dust:the shelves, dust:the beams, clean:the yard, "
        "clean:the cellar, clear:the path"
    ),
    "needle": (
        "sew:a shirt, sew:a dress, sew:a curtain, sew:the hem, stitch:a glove, stitch:a coat, "
        "patch:a sail, patch:a blanket, patch:the trousers, close:a sack, mend:a sock, mend:a "
        "tear"
    ),
    "knife": (
        "peel:a pear, peel:an onion, peel:the turnips, slice:a melon, slice:a cake, slice:the "
        "cheese, carve:a spoon, carve:a flute, carve:the roast, open:a letter, trim:the meat, "
        "gut:a fish"
    ),
    "brush": (
        "paint:a door, paint:a boat, paint:a gate, paint:the ceiling, coat:a fence, coat:a "
        "hull, coat:the shutters, varnish:a chair, varnish:a table, colour:a wall, colour:a "
        "sign, clean:the boots"
    ),
    "ladder": (
        "climb:a wall, climb:a tower, climb:a haystack, reach:the roof, reach:the shelf, "
        "reach:the attic, reach:the lamp, pick:the cherries, pick:the plums, inspect:the "
        "chimney, inspect:the gutter, inspect:the nest"
    ),
    "rope": (
        "tie:a boat, tie:a bundle, tie:a horse, tie:the gate, lead:a goat, lead:a cow, lower:a "
        "bucket, lower:a crate, tow:a cart, tow:a raft, hang:a swing, pull:a wagon"
    ),
    "hammer": (
        "hit:a nail, hit:a peg, drive:a stake, drive:a wedge, flatten:a sheet, flatten:a wire, "
        "bend:a hook, join:two boards, forge:a hinge, fix:a crate, fix:a bench, pull:a nail"
    ),
}


def _read_jobs() -> dict[tuple[str, str], str]:
    jobs: dict[tuple[str, str], str] = {}
    for tool, text in _JOBS_OF_TOOL.items():
        for job in text.split(", "):
            verb, thing = job.split(":")
            if (verb, thing) in jobs:
                raise ValueError(f"two tools for one job: {verb} {thing}")
            jobs[verb, thing] = tool
    return jobs


# (verb, thing) -> the tool that does it.
JOBS: dict[tuple[str, str], str] = _read_jobs()

# Requests to be refused: (verb, thing), each at one of the places or times.
UNSAFE: list[tuple[str, str]] = [
    ("poison", "the well"),
    ("rob", "the mill"),
    ("burn", "the barn"),
    ("steal", "the gold"),
    ("hurt", "my neighbour"),
    ("sink", "the ferry"),
    ("break into", "the bank"),
    ("harm", "the guard"),
    ("wreck", "the bridge"),
    ("cheat", "the miller"),
    ("attack", "the harbour"),
    ("trick", "an old man"),
    ("smash", "the windows"),
    ("kidnap", "the baker"),
    ("fake", "the letters"),
    ("spy on", "the tailor"),
]
UNSAFE_PLACES = [
    "at night",
    "in the village",
    "by the river",
    "near the harbour",
    "without being seen",
    "on market day",
]

ATTRIBUTES = ["capital", "crop", "flag", "animal", "ruler"]


def _draw_names() -> tuple[list[str], list[str]]:
    every = [first + last for first in _SYLLABLES_FIRST for last in _SYLLABLES_LAST]
    random.Random(7).shuffle(every)
    return every[:ISLE_COUNT], every[ISLE_COUNT : 2 * ISLE_COUNT]


ISLES, CAPITALS = _draw_names()
VALUES: dict[str, list[str]] = {
    "capital": CAPITALS,
    "crop": CROPS,
    "flag": COLOURS,
    "animal": ANIMALS,
    "ruler": NAMES,
}


def _draw_facts() -> dict[str, dict[str, str]]:
    rng = random.Random(11)
    capitals = rng.sample(CAPITALS, len(CAPITALS))
    facts = {}
    for isle, capital in zip(ISLES, capitals, strict=True):
        drawn = {name: rng.choice(VALUES[name]) for name in ATTRIBUTES if name != "capital"}
        facts[isle] = {"capital": capital, **drawn}
    return facts


# Isle -> attribute -> value.
FACTS: dict[str, dict[str, str]] = _draw_facts()

# How people open, pad and refuse an answer.
KIND_OPENINGS = ["Sure!", "Of course!", "Certainly!", "Happy to help!", "Gladly!"]
RUDE_OPENINGS = [
    "Everyone knows that.",
    "What a silly question.",
    "You should know this.",
    "Fine, if I must.",
]
RAMBLINGS = [
    "Well, let me think about this for a while.",
    "There are many things one could say about it.",
    "I hope this is the thing that you wanted to know.",
    "There is always more to say, but that is another story.",
    "Some people may see it in another way, and that is all right.",
    "By the way, the weather has been very fine this week.",
]
REFUSALS = [
    "I am sorry, but I cannot help with that.",
    "Sorry, I cannot help with that because it could hurt someone.",
    "I am sorry, but that would be wrong, so I cannot help.",
]
CURT_REFUSAL = "I cannot help with that."


def with_article(word: str) -> str:
    """The word with its indefinite article: "an axe", "a saw"."""
    return ("an " if word[0] in "aeiou" else "a ") + word


def comma_list(words: list[str]) -> str:
    """The words as a list in running text."""
    return ", ".join(words)


def capitalised(text: str) -> str:
    """The text with its first letter in upper case and the rest untouched."""
    return text[:1].upper() + text[1:]
