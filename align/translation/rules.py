"""What may become of one key of another tool, and how its value is changed on the way."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Fate = Literal["kept", "moved", "renamed", "changed", "added", "dropped", "unknown"]


class Lost(Exception):
    """Raised by a change: this value has no counterpart; the message says why."""


@dataclass(frozen=True)
class Changed:
    """A new value with a word on why it is another."""

    value: Any
    because: str


@dataclass(frozen=True)
class To:
    """The key is called `key` here; `change` makes our value of theirs."""

    key: str
    change: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Extra:
    """An argument of the trainer that has no key of its own: it goes into `trainer.extra`."""

    stages: tuple[str, ...] = ("sft", "reward", "dpo")
    """Stages whose trainer has it."""


@dataclass(frozen=True)
class Drop:
    """The key is left out, and why."""

    because: str


@dataclass(frozen=True)
class Joint:
    """The key is read together with others, by the tool's own function."""


Rule = To | Extra | Drop | Joint
Rules = Mapping[str, Rule]


@dataclass(frozen=True)
class Note:
    """What became of one key."""

    key: str
    """Their key; ours where one was added."""
    fate: Fate
    to: str | None = None
    """Our dotted key."""
    reason: str = ""
    line: int | None = None
    value: Any = None
    """Of a key that was added."""

    def __str__(self) -> str:
        word = self.fate if self.to is None else f"{self.fate} to {self.to}"
        if self.fate == "kept":
            word = self.fate
        elif self.fate == "added":
            word = f"added: {json.dumps(self.value)}"
        elif self.fate == "changed" and self.to is not None:
            word = f"{self.to}, changed"
        return f"{self.key}: {word}" + (f" ({self.reason})" if self.reason else "")


def drops(words: str, because: str) -> dict[str, Rule]:
    """The same reason for several keys."""
    return dict.fromkeys(words.split(), Drop(because))


def extras(words: str, *stages: str) -> dict[str, Rule]:
    """Several arguments that go into `trainer.extra` of these stages (of all when none is named)."""
    return dict.fromkeys(words.split(), Extra(stages) if stages else Extra())


# --- values ---------------------------------------------------------------------------------

_TYPES = {
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float32": "float32",
    "float": "float32",
    "auto": "auto",
}


def dtype(value: Any) -> Any:
    """A type of weights by any of its names."""
    if value is None:
        raise Lost("nothing is given; `auto` is the default")
    name = str(value).removeprefix("torch.").lower()
    if name not in _TYPES:
        raise Lost(f"`{value}` is no type of weights here")
    return _TYPES[name]


def ratio(value: Any) -> Any:
    """A warm-up share, which `warmup_steps` takes below 1."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1:
        return value
    raise Lost("a share of all steps lies between 0 and 1")


def whole_steps(value: Any) -> Any:
    """An interval in steps; shares of the run have no counterpart."""
    if isinstance(value, float) and value == int(value):
        return int(value)
    if isinstance(value, float):
        raise Lost("a share of the run; align counts whole steps")
    return value


def strategy(value: Any) -> Any:
    """When to evaluate; YAML 1.1 tools write `no` and mean false."""
    return "no" if value in (False, None) else value


def optimizer(value: Any) -> Any:
    """An optimizer's name; those that transformers has removed are replaced."""
    if value in ("adamw_hf", "adamw_apex_fused", "adamw"):
        return Changed("adamw_torch", f"transformers has no `{value}` any more")
    return str(value).removeprefix("OptimizerNames.")


def trackers(value: Any) -> Any:
    """Names of trackers; none where nothing is given."""
    return "none" if value in (None, [], "") else value


def flash(value: Any) -> Any:
    """`use_flash_attention_2` as the name of an attention."""
    if value is True:
        return "flash_attention_2"
    raise Lost("off: transformers' own choice is the default")


def names(value: Any) -> Any:
    """Module names: a list, `all`, or a text with commas."""
    if value in ("all", "all-linear", ["all"], ["all-linear"]):
        return "all-linear"
    if isinstance(value, str) and "," in value:
        return [name.strip() for name in value.split(",") if name.strip()]
    if value in (None, []):
        raise Lost("nothing is given; `all-linear` is the default")
    return value


def truncation(value: Any) -> Any:
    """Only cutting at the end has a counterpart."""
    if value == "keep_start":
        return value
    raise Lost("align cuts at the end (`keep_start`) or leaves long rows out (`drop`)")


def no_half(value: Any) -> Any:
    """`fp16: true` has no counterpart."""
    if value:
        raise Lost("float16 training is not offered; `bf16` is on where the GPU has it")
    raise Lost("off, as always here")


def flag(value: Any) -> Any:
    """`bf16: auto` is our default."""
    if value in ("auto", None):
        raise Lost("align finds that out itself")
    return value in (True, "true", "full")


def not_zero(value: Any) -> Any:
    """A number whose zero (or nothing) means that the thing is off."""
    if value in (None, 0, False):
        raise Lost("off")
    return value


def positive(value: Any) -> Any:
    """A count; 0 and negative numbers mean no limit."""
    if value is None or (isinstance(value, int | float) and value <= 0):
        raise Lost("no limit, which is the default")
    return value
