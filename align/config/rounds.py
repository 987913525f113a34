"""`rounds:` of a pipeline: a block of stages that repeats, written out as ordinary stages `name@1`, `name@2`, ...

Every round is written out before anything is checked, so that the rest of align knows stages only. In a stage of a
round `$name` is this round's stage, `$previous` the policy that the round before left, and `$start` the model that
the recipe lets each round start from; after the rounds `$name` is the last round's.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from align.config.draft import Draft, Given, Override
from align.config.faults import faults
from align.config.fields import leaf_fields
from align.config.paths import Trouble, path_values, put
from align.config.problems import KeyPath, Source, shown
from align.config.references import FORM
from align.config.sections import PositiveInt, Section
from align.config.suggest import nearest
from align.config.yaml import parse_value

Keep = Literal["last", "all"] | PositiveInt
Prompts = Literal["split", "same"] | PositiveInt

MOST = 99
"""Rounds at most."""

DRAWING = ("sample", "ppo")
"""Stages that draw answers: they get new prompts in each round."""

TOLD = "org/model"
"""Stands for a model whose trouble is told: it has the form of a Hub id, so that nothing is told twice."""

PREVIOUS, START = "previous", "start"
"""`$previous` and `$start`."""

BOUND = r"\d+(?:(?:\.\d+)?%)?"
SPLIT = re.compile(rf"\s*([^\[\]+]+?)\s*(?:\[\s*({BOUND})?\s*:\s*({BOUND})?\s*\])?\s*")


class RoundsConfig(Section):
    """A block of stages that repeats, with the last round's policy, prompts of its own and the data that are kept."""

    number: Annotated[int, Field(ge=1, le=MOST)]
    """Rounds."""
    stages: Annotated[list[str], Field(min_length=1)] | None = None
    """Stages of a round, which stand together in `stages`; all of them when unset."""
    policy: str | None = None
    """The stage of a round whose model is `$previous` in the next one."""
    first: str | None = None
    """`$previous` in the first round: a model, or `$name` of a stage above; what `start` says when unset."""
    start: str | None = None
    """`$start`: a model, from which each round begins anew (Llama 3), or `previous`: the last policy goes on."""
    keep: Keep | dict[str, Keep] = "last"
    """Rounds whose samples a stage reads: `last` (its own), `all` so far, or how many; one rule, or one by stage."""
    prompts: Prompts | dict[str, Prompts] = "split"
    """Rows of a round: an equal part each (`split`), the `same`, or how many; for stages that draw, or by stage."""


def part_of(split: str, number: int, rule: str | int, rounds: int) -> str:
    """The rows of round `number` (from 1) of `rounds`: `train[:600]` is `train[200:400]` in the second of three.

    Raises:
        ValueError: with what is in the way, where no part can be told or none is left.
    """
    match = SPLIT.fullmatch(split)
    if match is None:
        raise ValueError("is no single split with bounds that count from its beginning")
    name, low, high = match.groups()
    percent = {text[-1] == "%" for text in (low, high) if text and text != "0"}
    if percent == {True, False}:
        raise ValueError("mixes rows and shares")
    if rule == "split" and percent != {False}:
        first, last = (
            float((text or end).rstrip("%")) for text, end in ((low, "0"), (high, "100"))
        )
        bounds = [f"{first + (last - first) * at / rounds:.10g}%" for at in (number - 1, number)]
        return f"{name}[{bounds[0]}:{bounds[1]}]"
    if percent == {True} or (rule == "split" and high is None):
        raise ValueError("says no number of rows")
    begin, end = int(low or 0), None if high is None else int(high)
    if rule == "split":
        assert end is not None
        places = [begin + (end - begin) * at // rounds for at in (number - 1, number)]
    else:
        places = [begin + int(rule) * at for at in (number - 1, number)]
        places[1] = places[1] if end is None else min(places[1], end)
    if places[0] >= places[1]:
        raise ValueError(f"has no rows left for round {number}")
    return f"{name}[{places[0]}:{places[1]}]"


@dataclass
class Rounds:
    """The block that repeats, checked, and how its stages are written out."""

    config: RoundsConfig
    block: tuple[str, ...]
    """Names of the stages of a round, in order."""
    sources: Mapping[str, Source] = field(default_factory=dict)
    """Key of `rounds:` -> where it was given."""

    # --- names ------------------------------------------------------------------------------

    def written_out(self, names: Sequence[str]) -> list[tuple[str, str, int | None]]:
        """Name, entry in `stages` and round (None outside the block) of every stage, in order."""
        found: list[tuple[str, str, int | None]] = []
        for name in names:
            if name == self.block[0]:
                numbers = range(1, self.config.number + 1)
                found += [(f"{one}@{at}", one, at) for at in numbers for one in self.block]
            elif name not in self.block:
                found.append((name, name, None))
        return found

    def all_of(self, name: str) -> list[str]:
        """The stages that a name of the recipe stands for."""
        if name not in self.block:
            return [name]
        return [f"{name}@{number}" for number in range(1, self.config.number + 1)]

    # --- values -----------------------------------------------------------------------------

    def fill(self, draft: Draft, name: str, number: int | None) -> None:
        """Put the round into the values of one stage: what it starts from, its prompts, the data kept."""
        self._keep(draft, name, number)
        if number is not None:
            self._share(draft, name, number)
        for path, text in list(_paths(draft)):
            match = FORM.fullmatch(text)
            if match is None:
                continue
            stage, file = match[1], match[2]
            if stage in (PREVIOUS, START):
                self._model(draft, path, stage, number)
            elif stage in self.block:
                at = self.config.number if number is None else number
                _set(draft, path, f"${stage}@{at}" + (f"/{file}" if file else ""))

    def _model(self, draft: Draft, path: KeyPath, word: str, number: int | None) -> None:
        """Put in what `$previous` or `$start` means in a round."""
        start, policy, key = self.config.start, self.config.policy, START
        trouble: tuple[str, str] | None = None
        text: str | None = None
        if number is None:
            trouble = (
                f"uses `${word}`, which means something in a round only",
                "name a stage or a model",
            )
        elif word == START and start is None:
            trouble = "needs `rounds.start`", "give it a model, or `previous`"
        elif word == START and start != PREVIOUS:
            text = start
        elif number > 1 and policy is None:
            trouble = "needs `rounds.policy`", "name the stage whose model a round leaves"
        elif number > 1:
            _set(draft, path, f"${policy}@{number - 1}")
        elif self.config.first is not None:
            text, key = self.config.first, "first"
        elif start is not None and start != PREVIOUS:
            text = start
        else:
            hint = "give it a model, or `$name` of a stage above"
            trouble = "has no round before the first: `rounds.first` is not given", hint
        if trouble:
            draft.tell(Trouble(path, *trouble))
            _set(draft, path, TOLD)
        elif text is not None:
            _set(draft, path, text, self.sources.get(key))

    def _keep(self, draft: Draft, name: str, number: int | None) -> None:
        """Let a stage read the samples of as many rounds as the recipe keeps."""
        keep = self.config.keep
        rule = keep.get(name, "last") if isinstance(keep, dict) else keep
        if rule == "last" or (number is None and not isinstance(keep, dict)):
            return
        last = self.config.number if number is None else number
        first = 1 if rule == "all" else max(last - int(rule) + 1, 1)
        numbers = range(first, last + 1)

        def entries(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
            match = FORM.fullmatch(str(entry.get("path")))
            if match is None or match[1] not in self.block:
                return [dict(entry)]
            file = f"/{match[2]}" if match[2] else ""
            more = [dict(entry) | {"path": f"${match[1]}@{at}{file}"} for at in numbers]
            weight = entry.get("weight")
            if isinstance(weight, int | float) and not isinstance(weight, bool):
                more = [one | {"weight": weight / len(numbers)} for one in more]
            return more

        _replace_entries(draft, entries, self._said("keep"))

    def _share(self, draft: Draft, name: str, number: int) -> None:
        """Let a stage read its round's part of the rows that come from outside the rounds."""
        prompts = self.config.prompts
        rule: str | int = "same"
        if isinstance(prompts, dict):
            rule = prompts.get(name, "split" if draft.kind in DRAWING else "same")
        elif draft.kind in DRAWING:
            rule = prompts
        if rule == "same" or (self.config.number == 1 and rule == "split"):
            return
        said = self._said("prompts")

        def part(path: KeyPath, split: Any) -> str | None:
            try:
                return part_of(str(split), number, rule, self.config.number)
            except ValueError as error:
                hint = "give rows as in `train[:6000]`, or `rounds.prompts: same`"
                message = f"cannot be divided among the rounds: `{split}` {error}"
                draft.tell(Trouble(path, message, hint))
                return None

        source = draft.given.get("data.dataset_name")
        if source is not None and not FORM.fullmatch(str(source.value)):
            key = "data.dataset_train_split"
            given = draft.given.get(key) or Given("train", source.source)
            found = part(tuple(key.split(".")), given.value)
            if found is not None:
                draft.given[key] = Given(found, said(given.source))

        def entries(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
            if FORM.fullmatch(str(entry.get("path"))):
                return [dict(entry)]
            found = part(("data", "datasets"), entry.get("split", "train"))
            return [dict(entry) | ({"split": found} if found else {})]

        if "data.datasets" in draft.given:
            _replace_entries(draft, entries, said)

    def _said(self, key: str) -> Callable[[Source], Source]:
        """A source with the place of the rule of `rounds:` that had a hand in the value."""
        at = self.sources.get(key)

        def said(source: Source) -> Source:
            if at is None:
                return source
            return source._replace(origin=f"{source.origin} (rounds.{key}: {at.origin})")

        return said


def _paths(draft: Draft) -> Iterator[tuple[KeyPath, str]]:
    """Path and text of everything given that names a model or rows."""
    nested: dict[str, Any] = {}
    for name, given in draft.given.items():
        section, _, leaf = name.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[leaf] = given.value
    for _, path, text in path_values(nested):
        yield path, text


def _set(draft: Draft, path: KeyPath, text: str, source: Source | None = None) -> None:
    """Replace one text of a draft; `source` says where the new one comes from, if not from there."""
    name = draft.leaf_of(path)
    given, inner = draft.given[name], path[len(name.split(".")) :]
    if not inner:
        draft.given[name] = replace(given, value=text, source=source or given.source)
        return
    value = deepcopy(given.value)
    put(value, inner, text)
    places = dict(given.inner) | ({inner: source} if source else {})
    draft.given[name] = replace(given, value=value, inner=places)


def _replace_entries(
    draft: Draft,
    entries: Callable[[Mapping[str, Any]], list[dict[str, Any]]],
    said: Callable[[Source], Source],
) -> None:
    """Put the entries that `entries` makes of each one into `data.datasets`.

    A `dataset_name` that becomes several entries moves there with its split.
    """
    name, many = draft.given.get("data.dataset_name"), draft.given.get("data.datasets")
    if name is not None and isinstance(name.value, str):
        found = entries({"path": name.value})
        if len(found) > 1:
            split = draft.given.pop("data.dataset_train_split", None)
            more = {"split": split.value} if split else {}
            del draft.given["data.dataset_name"]
            made = [one | more for one in found]
            draft.given["data.datasets"] = Given(made, said(name.source))
        elif found[0]["path"] != name.value:
            draft.given["data.dataset_name"] = replace(name, value=found[0]["path"])
        return
    if many is None or not isinstance(many.value, list):
        return
    value: list[Any] = []
    inner: dict[KeyPath, Source] = {}
    texts: dict[KeyPath, str] = {}
    for place, entry in enumerate(many.value):
        made_of = entries(entry) if isinstance(entry, Mapping) else [entry]
        for one in made_of:
            inner |= _moved(many.inner, place, len(value))
            texts |= _moved(many.texts, place, len(value))
            value.append(one)
    draft.given["data.datasets"] = Given(value, said(many.source), inner, texts)


def _moved(places: Mapping[KeyPath, Any], old: int, new: int) -> dict[KeyPath, Any]:
    return {(new, *path[1:]): at for path, at in places.items() if path[:1] == (old,)}


# --- reading --------------------------------------------------------------------------------


Tell = Callable[[Source, KeyPath, str, str | None, Any], None]
"""Source, key, message, hint, value of a problem."""


def read_rounds(
    given: Any,
    names: Sequence[str],
    source_of: Callable[[KeyPath], Source],
    changes: Sequence[Override],
    tell: Tell,
) -> Rounds | None:
    """The checked `rounds:` of a pipeline; None where there is none, or no use can be made of it.

    Args:
        given: the value of `rounds`: a number, or a mapping.
        names: the stages of the pipeline in order.
        source_of: where a path of the file stands.
        changes: overrides, some of which begin with `rounds.`.
        tell: takes what is wrong.
    """
    if given is None and not any(change.key.partition(".")[0] == "rounds" for change in changes):
        return None
    if not isinstance(given, Mapping):
        given = {} if given is None else {"number": given}
    values = dict(given)
    sources = {key: source_of(("rounds", key)) for key in values}
    for change in changes:
        head, _, key = change.key.partition(".")
        if head == "rounds":
            key = key or "number"
            outer, _, inner = key.partition(".")
            value = change.value
            if isinstance(value, str):
                value = parse_value(value, change.origin)[0]
            kept = values.get(outer)
            kept = kept if isinstance(kept, Mapping) else {}
            values[outer] = {**kept, inner: value} if inner else value
            sources[outer] = Source(change.origin, key=f"rounds.{outer}")

    def told(path: KeyPath, message: str, hint: str | None = None, value: Any = None) -> None:
        known = len(path) > 0 and path[0] in sources
        source = (
            source_of(("rounds", *path)) if len(path) > 1 or not known else sources[str(path[0])]
        )
        tell(source, ("rounds", *path), message, hint, value)

    config = _checked(values, told)
    if config is None:
        return None
    block = tuple(config.stages or [name for name in names if "@" not in name])
    rounds = Rounds(config, block, sources)
    return rounds if _fits(rounds, names, told) else None


def _checked(values: dict[str, Any], told: Callable[..., None]) -> RoundsConfig | None:
    leaves = {leaf.name: leaf for leaf in leaf_fields(RoundsConfig)}
    unknown = [key for key in values if key not in leaves]
    for key in unknown:
        close = nearest(key, leaves)
        hint = f"did you mean `rounds.{close}`?" if close else f"one of {', '.join(leaves)}"
        told((key,), f"is no key of `rounds` (value {shown(values[key])})", hint, values[key])
    known = {key: value for key, value in values.items() if key not in unknown}
    if isinstance(known.get("number"), bool):
        known["number"] = str(known["number"]).lower()
    try:
        found = RoundsConfig.model_validate(known)
    except ValidationError as error:
        for fault in faults(error, known, leaves):
            told(fault.path, fault.message, fault.hint, fault.value)
        return None
    return None if unknown else found


def _fits(rounds: Rounds, names: Sequence[str], told: Callable[..., None]) -> bool:
    """Whether what `rounds:` names are stages, which stand together."""
    config, block = rounds.config, rounds.block
    wrong = 0
    plain = [name for name in names if "@" not in name]

    def check(path: KeyPath, name: str, among: Sequence[str], what: str) -> None:
        nonlocal wrong
        if name not in among:
            close = nearest(name, among)
            hint = f"did you mean `{close}`?" if close else f"one of {', '.join(among)}"
            told(path, f"names no {what}: {shown(name)}", hint, name)
            wrong += 1

    for at, name in enumerate(config.stages or []):
        check(("stages", at), name, plain, "stage")
    if config.policy is not None:
        check(("policy",), config.policy, block, "stage of a round")
    for key in ("keep", "prompts"):
        rules = getattr(config, key)
        for name in rules if isinstance(rules, dict) else ():
            check((key, name), name, plain if key == "keep" else block, "stage")
    for name in plain:
        if name in (PREVIOUS, START):
            told((), f"gives `${name}` a meaning: no stage can have that name", "choose another")
            wrong += 1
    if not wrong:
        first = plain.index(block[0]) if block else 0
        if tuple(plain[first : first + len(block)]) != block:
            hint = f"as they are in `stages`: {', '.join(plain)}"
            told(("stages",), "must stand together, and in their order", hint, list(block))
            wrong += 1
    return not wrong
