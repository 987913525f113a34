"""Rules that turn scored completions into chosen/rejected pairs.

A group is what was sampled for one prompt: `{"row": row, "completions": [{"text", "score",
"ended"}, ...]}`, where `row["prompt"]` is text or messages. A rule is
`rule(groups, *, seed, pairs_per_prompt, min_gap) -> list[pair]`, a pair
`{"prompt", "chosen", "rejected", "margin", "kind"}` with the margin in units of the score, and the
row's `tools` where it offers functions. Equal texts count once, and equal scores make no pair.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random
from typing import Any

from align.config.suggest import nearest
from align.data.exact import TOOLS
from align.errors import fail

Group = Mapping[str, Any]
Completion = Mapping[str, Any]
Pair = dict[str, Any]
Rule = Callable[..., list[Pair]]


def best_worst(
    groups: Sequence[Group], *, seed: int, pairs_per_prompt: int = 1, min_gap: float = 0.0
) -> list[Pair]:
    """The best against the worst; then the second best against the second worst, and so on."""

    def candidates(ranked: list[Completion], _: Random) -> Iterator[tuple[int, int]]:
        return ((at, len(ranked) - 1 - at) for at in range(len(ranked) // 2))

    return _pairs(groups, "best_worst", candidates, seed, pairs_per_prompt, min_gap)


def best_random(
    groups: Sequence[Group], *, seed: int, pairs_per_prompt: int = 1, min_gap: float = 0.0
) -> list[Pair]:
    """The best against others drawn at random."""

    def candidates(ranked: list[Completion], rng: Random) -> Iterator[tuple[int, int]]:
        others = range(1, len(ranked))
        return ((0, other) for other in rng.sample(others, len(others)))

    return _pairs(groups, "best_random", candidates, seed, pairs_per_prompt, min_gap)


def adjacent(
    groups: Sequence[Group], *, seed: int, pairs_per_prompt: int = 1, min_gap: float = 0.0
) -> list[Pair]:
    """From the best down, each against the next one that is at least `min_gap` worse."""

    def candidates(ranked: list[Completion], _: Random) -> Iterator[tuple[int, int]]:
        for at in range(len(ranked)):
            lower = range(at + 1, len(ranked))
            for other in lower:
                if _is_wide(_gap(ranked[at], ranked[other]), min_gap):
                    yield at, other
                    break

    return _pairs(groups, "adjacent", candidates, seed, pairs_per_prompt, min_gap)


def random(
    groups: Sequence[Group], *, seed: int, pairs_per_prompt: int = 1, min_gap: float = 0.0
) -> list[Pair]:
    """Any two, drawn at random; the better one is chosen."""

    def candidates(ranked: list[Completion], rng: Random) -> Iterator[tuple[int, int]]:
        places = range(len(ranked))
        both = [(better, worse) for worse in places for better in range(worse)]
        return iter(rng.sample(both, len(both)))

    return _pairs(groups, "random", candidates, seed, pairs_per_prompt, min_gap)


Candidates = Callable[[list[Completion], Random], Iterator[tuple[int, int]]]
"""Places (better, worse) in a list that is ranked from the best down."""


def _pairs(
    groups: Sequence[Group],
    kind: str,
    candidates: Candidates,
    seed: int,
    pairs_per_prompt: int,
    min_gap: float,
) -> list[Pair]:
    pairs = []
    for at, group in enumerate(groups):
        # A stream for each prompt: its pairs do not depend on the prompts before it.
        rng = Random(f"{kind} {seed} {at}")
        ranked = ranking(group["completions"])
        taken = 0
        for better, worse in candidates(ranked, rng):
            gap = _gap(ranked[better], ranked[worse])
            if taken < pairs_per_prompt and _is_wide(gap, min_gap):
                pairs.append(_pair(group["row"], ranked[better], ranked[worse], gap, kind))
                taken += 1
    return pairs


def ranking(completions: Sequence[Completion]) -> list[Completion]:
    """The distinct texts from the best score down; the earlier sample goes first where equal."""
    distinct: dict[str, Completion] = {}
    for completion in completions:
        known = distinct.get(completion["text"])
        if known is None or completion["score"] > known["score"]:
            distinct[completion["text"]] = completion
    return sorted(distinct.values(), key=lambda completion: -completion["score"])


def _gap(better: Completion, worse: Completion) -> float:
    return float(better["score"]) - float(worse["score"])


def _is_wide(gap: float, min_gap: float) -> bool:
    return gap > 0 and gap >= min_gap


def _pair(
    row: Mapping[str, Any], chosen: Completion, rejected: Completion, gap: float, kind: str
) -> Pair:
    prompt = row["prompt"]
    return {
        "prompt": prompt,
        "chosen": as_completion(prompt, chosen["text"]),
        "rejected": as_completion(prompt, rejected["text"]),
        "margin": gap,
        "kind": kind,
    } | offered(row)


def offered(row: Mapping[str, Any]) -> dict[str, Any]:
    """The functions that the chat of a row offers (or that it offers none), for a new row."""
    is_chat = not isinstance(row["prompt"], str)
    return {TOOLS: row[TOOLS]} if is_chat and TOOLS in row else {}


def as_completion(prompt: Any, text: str) -> str | list[dict[str, str]]:
    """An answer in the form of its prompt: text, or an assistant's message."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


SHARED = ("seed", "pairs_per_prompt", "min_gap")
"""Arguments that a rule gets if its signature has them."""


def check_options(name: str, rule: Rule, options: Mapping[str, Any]) -> None:
    """Refuse options that the rule does not take, before anything is sampled."""
    known = list(inspect.signature(rule).parameters)[1:]
    own = [key for key in known if key not in SHARED]
    for key in options:
        where = f"pairs.rule_options.{key}"
        if key in SHARED:
            place = "seed" if key == "seed" else f"pairs.{key}"
            fail("is set elsewhere in the recipe", where=where, hint=f"set `{place}` instead")
        if key not in own:
            near = nearest(key, own)
            listed = f"its options are {', '.join(own)}" if own else "it has no options"
            hint = f"did you mean `{near}`?" if near else listed
            fail(f"the rule `{name}` has no such option", where=where, hint=hint)


def apply_rule(
    rule: Rule,
    groups: Sequence[Group],
    *,
    seed: int,
    pairs_per_prompt: int,
    min_gap: float,
    options: Mapping[str, Any],
) -> list[Pair]:
    """The rule's pairs without repetition; it gets of the shared arguments what it takes."""
    shared = {"seed": seed, "pairs_per_prompt": pairs_per_prompt, "min_gap": min_gap}
    taken = inspect.signature(rule).parameters
    known = {key: value for key, value in shared.items() if key in taken}
    pairs: dict[str, Pair] = {}
    tools = _tools_of(groups)
    for pair in rule(groups, **known, **options):
        # A rule of one's own may know of prompts and answers only.
        if TOOLS not in pair and (given := tools.get(repr(pair["prompt"]))) is not None:
            if len(given) > 1:
                fail(
                    "gave a pair without `tools`, to a prompt that comes with different ones",
                    where=f"pair rule `{getattr(rule, '__name__', rule)}`",
                    hint="copy `tools` from the group's row into the pair",
                )
            pair |= given[0]
        key = repr((pair["prompt"], pair["chosen"], pair["rejected"], pair.get(TOOLS)))
        pairs.setdefault(key, pair)
    return list(pairs.values())


def _tools_of(groups: Sequence[Group]) -> dict[str, list[dict[str, Any]]]:
    """Prompts that come with functions -> the different sets of them that they come with."""
    rows = [group["row"] for group in groups]
    found: dict[str, list[dict[str, Any]]] = {}
    if not any(map(offered, rows)):
        return found
    for row in rows:
        sets = found.setdefault(repr(row["prompt"]), [])
        if offered(row) not in sets:
            sets.append(offered(row))
    return found
