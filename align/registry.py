"""Names that a recipe may use for functions: judges and pair rules.

A recipe can only name what is registered: text in a file never becomes code. The module behind a
name is imported when the name is used.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

from align.config.suggest import nearest
from align.errors import fail

Judge = Callable[..., dict[str, float]]
"""`judge(row, completion) -> {"score": float, ...}`."""

PairRule = Callable[..., list[Any]]
"""`rule(groups, *, seed, ...) -> pairs`."""

JUDGES: dict[str, str | Judge] = {
    "tiny_world": "align.tiny.judge:judge",
    "number": "align.evaluation.judges:number",
    "exact": "align.evaluation.judges:exact",
    "contains": "align.evaluation.judges:contains",
    "pattern": "align.evaluation.judges:pattern",
}
"""Judges by name, as functions or as `module:function`."""

PAIR_RULES: dict[str, str | PairRule] = {
    "best_worst": "align.generation.pairing:best_worst",
    "best_random": "align.generation.pairing:best_random",
    "adjacent": "align.generation.pairing:adjacent",
    "random": "align.generation.pairing:random",
    "tiny_world": "align.tiny.annotators:annotate",
}
"""Pair rules by name, as functions or as `module:function`."""

REWARD_FUNCS: dict[str, str | Callable[..., Any]] = {}
"""Reward functions by name: `function(prompts, completions, **columns) -> list of numbers`, as TRL's online
trainers call them. Judges can be used as reward functions too."""

Kind = Literal["judge", "pair rule", "reward function"]


def registered(kind: Kind) -> dict[str, Any]:
    """The names of a kind and what is behind them."""
    kinds: dict[Kind, dict[str, Any]] = {
        "judge": JUDGES,
        "pair rule": PAIR_RULES,
        "reward function": REWARD_FUNCS,
    }
    return kinds[kind]


def adopt_plugins(kind: Kind) -> None:
    """Add what installed packages offer under `align.judges`, `align.pair_rules`, `align.reward_funcs`."""
    groups = {"judge": "judges", "pair rule": "pair_rules", "reward function": "reward_funcs"}
    for point in entry_points(group=f"align.{groups[kind]}"):
        registered(kind).setdefault(point.name, point.value)


def check(kind: Kind, name: str) -> str | None:
    """None for a registered name, else the hint that leads to one."""
    known = registered(kind)
    if name not in known:
        adopt_plugins(kind)
    if name in known:
        return None
    close = nearest(name, known)
    return f"did you mean `{close}`?" if close else f"one of {', '.join(sorted(known))}"


def code_file(name: str) -> tuple[Path, str] | None:
    """File and function of a reward function `FILE.py:NAME`; None for a registered name."""
    path, found, function = name.rpartition(".py:")
    return (Path(f"{path}.py").expanduser(), function) if found else None


def check_reward(name: str) -> str | None:
    """None for a reward function or judge, else the hint that leads to one."""
    if check("reward function", name) is None or check("judge", name) is None:
        return None
    known = {**REWARD_FUNCS, **JUDGES}
    close = nearest(name, known)
    return f"did you mean `{close}`?" if close else f"one of {', '.join(sorted(known))}"


def resolve_reward(name: str) -> Callable[..., Any]:
    """The reward function or judge behind a name. Raises AlignError for a name that nobody registered."""
    hint = check_reward(name)
    if hint is not None:
        fail(f"no reward function or judge is called `{name}`", hint=hint)
    kind: Kind = "reward function" if name in REWARD_FUNCS else "judge"
    return resolve(kind, name)


def resolve(kind: Kind, name: str) -> Callable[..., Any]:
    """The function behind a name. Raises AlignError for a name that nobody registered."""
    hint = check(kind, name)
    if hint is not None:
        fail(f"no {kind} is called `{name}`", hint=hint)
    found = registered(kind)[name]
    if callable(found):
        function: Callable[..., Any] = found
        return function
    module, _, attribute = found.partition(":")
    function = getattr(import_module(module), attribute)
    return function


def _register(kind: Kind, name: str, function: Callable[..., Any]) -> None:
    known = registered(kind)
    if name in known and known[name] is not function:
        fail(f"a {kind} called `{name}` exists already", hint="choose another name")
    known[name] = function


def register_judge(name: str, function: Judge) -> None:
    """Make `function(row, completion) -> {"score": ...}` usable as `judge: name`."""
    _register("judge", name, function)


def register_pair_rule(name: str, function: PairRule) -> None:
    """Make `function(groups, *, seed, ...) -> pairs` usable as `pair_rule: name`."""
    _register("pair rule", name, function)


def register_reward_func(name: str, function: Callable[..., Any]) -> None:
    """Make `function(prompts, completions, **columns) -> list of numbers` usable in `reward_funcs`."""
    _register("reward function", name, function)
