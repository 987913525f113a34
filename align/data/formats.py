"""Recognises the form of a source's rows, says it, and turns the rows into canonical ones."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NoReturn

import numpy as np
from datasets import Dataset, Features, Value

from align.config.sections import DataSection, Format
from align.config.suggest import nearest
from align.data import conversion
from align.data.conversion import NothingToLearn
from align.data.counts import rows_of
from align.data.exact import TOOLS, as_text
from align.data.extras import NONE, Extras, extras_of, pruned, turns
from align.data.files import MOST_PROBLEMS
from align.data.sources import Indices, Source
from align.data.tool_use import LEAVE_OUT, RowError, functions, stored
from align.errors import AlignError, Problem, fail

Purpose = Literal["demonstrations", "preference", "prompts"]

TEXT = Value("string")

TOLERATED = 0.01
"""Share of a source's rows that may teach nothing (two equal sides, an empty answer): they are left
out and said. Large public preference sets hold a few; more of them is an error."""

Candidate = tuple[Format, tuple[str, ...]]

CANDIDATES: dict[Purpose, tuple[Candidate, ...]] = {
    "demonstrations": (
        ("messages", ("messages",)),
        ("sharegpt", ("conversations",)),
        ("alpaca", ("instruction", "output")),
        ("prompt_completion", ("prompt", "completion")),
        ("text", ("text",)),
    ),
    "preference": (
        ("preference", ("chosen", "rejected")),
        ("preference", ("completions",)),
        ("preference", ("answers",)),
        ("preference", ("ranking",)),
    ),
    "prompts": (
        ("messages", ("messages",)),
        ("sharegpt", ("conversations",)),
        ("alpaca", ("instruction",)),
        ("prompts", ("prompt",)),
        ("preference", ("chosen",)),
    ),
}
"""Forms that serve a purpose, with the columns that each needs, the most telling first."""

NEEDS: dict[Purpose, str] = {
    "demonstrations": "demonstrations",
    "preference": "preference pairs",
    "prompts": "prompts",
}

CHATS = ("messages", "sharegpt", "alpaca", "hh_rlhf")
"""Forms that are always chats; the others are what their values are."""

RANKED = ("completions", "answers", "ranking")
"""Columns with all answers to one prompt, of which every differently ranked pair is taken."""

SAID = {
    "messages": "chats in messages",
    "sharegpt": "ShareGPT conversations",
    "alpaca": "Alpaca instructions, as chats",
    "text": "plain text, all of it in the loss",
    "hh_rlhf": "hh-rlhf transcripts",
}


@dataclass(frozen=True)
class Recognised:
    """The form of a source's rows."""

    purpose: Purpose
    format: Format
    chat: bool
    """Messages that a chat template renders, or plain text."""
    column: str
    """The column that told the form."""
    margin: bool
    """Whether pairs say how much better the chosen answer is."""
    sentence: str
    """What was recognised, for the user."""
    extras: Extras = NONE
    """What the rows hold beside roles and contents: tools, their calls, marks."""


@dataclass(frozen=True)
class Canonical:
    """Canonical rows of a source."""

    dataset: Dataset
    form: Recognised
    source: Source
    rows: Indices
    """For each canonical row its index in the source."""
    left_out: list[Problem]
    """Rows that teach nothing, with the reason."""

    def where(self, index: int) -> str:
        """File and row number that a canonical row comes from."""
        return self.source.where(int(self.rows[index]))


def recognise(source: Source, purpose: Purpose) -> Recognised:
    """Say which form the rows of a source have.

    Raises:
        AlignError: the rows are of no known form, or of one that serves another purpose.
    """
    mapping = _checked_mapping(source)
    names = {*source.dataset.column_names, *mapping}
    form, needed = _candidate(source, purpose, names, set(mapping))
    column = needed[0]
    firsts = [_first(source, name, mapping) for name in {*needed, "prompt"} if name in names]
    transcripts = any(conversion.is_transcript(first) for first in firsts)
    if transcripts and purpose != "demonstrations":
        form = "hh_rlhf"
    is_chat = form in CHATS or transcripts or any(isinstance(first, list) for first in firsts)
    is_chat |= purpose == "preference" and "prompt" not in names and "instruction" in names
    margin = column in RANKED
    margin |= "margin" in names or {"score_chosen", "score_rejected"} <= names
    margin &= purpose == "preference"
    extras = extras_of(source.dataset, mapping.get(TOOLS, TOOLS)) if is_chat else NONE
    if not is_chat:
        _refuse_tools(source, mapping.get(TOOLS, TOOLS))
    sentence = _sentence(source, form, is_chat, column, margin, extras)
    return Recognised(purpose, form, is_chat, column, margin, sentence, extras)


def _refuse_tools(source: Source, column: str) -> None:
    """Plain text has no template that would write its functions."""
    if column not in source.dataset.column_names:
        return
    for row, value in enumerate(source.dataset[column]):
        try:
            found = functions(value, column)
        except RowError:
            return  # some other column of that name
        if found:
            fail(
                f"has functions in `{column}`, and is plain text, which no chat template renders",
                where=source.where(row),
                hint=f"give messages instead of text; {LEAVE_OUT}",
            )


def _checked_mapping(source: Source) -> dict[str, str]:
    names = source.dataset.column_names
    mapping = source.columns or {}
    problems = []
    for ours, theirs in mapping.items():
        if theirs not in names:
            close = nearest(theirs, names)
            hint = f"did you mean `{close}`?" if close else f"its columns: {', '.join(names)}"
            problems.append(
                Problem(
                    f"there is no column `{theirs}` (for `{ours}`)", f"{source.name} columns", hint
                )
            )
    if problems:
        raise AlignError(*problems)
    return mapping


def _candidate(source: Source, purpose: Purpose, names: set[str], mapped: set[str]) -> Candidate:
    candidates = CANDIDATES[purpose]
    if source.format != "auto":
        wanted = "preference" if source.format == "hh_rlhf" else source.format
        candidates = tuple(item for item in candidates if item[0] == wanted)
        if not candidates:
            _no_form(source, purpose, names)
        found = _fitting(candidates, names)
        if found is None:
            needed = " or ".join(" and ".join(f"`{n}`" for n in item[1]) for item in candidates)
            fail(
                f"has no column {needed} for the format `{source.format}`",
                where=source.name,
                hint=f"map its columns with data.columns: {', '.join(source.dataset.column_names)}",
            )
        return found
    # A prompt in messages is the prompt; one in plain text may stand beside whole chats.
    own_prompt = _first(source, "prompt", {}) if "prompt" not in mapped else None
    if purpose == "prompts" and isinstance(own_prompt, list):
        return "prompts", ("prompt",)
    found = _fitting(candidates, mapped) or _fitting(candidates, names)
    if found is None:
        _no_form(source, purpose, names)
    return found


def _fitting(candidates: Sequence[Candidate], names: set[str]) -> Candidate | None:
    return next((item for item in candidates if set(item[1]) <= names), None)


def _no_form(source: Source, purpose: Purpose, names: set[str]) -> NoReturn:
    needs = NEEDS[purpose]
    columns = ", ".join(f"`{name}`" for name in source.dataset.column_names)
    example = {
        "demonstrations": "{prompt: ..., completion: ...}; chats: {instruction: ..., output: ...}",
        "preference": "{prompt: ..., chosen: ..., rejected: ...}",
        "prompts": "{prompt: ...}; chats: {instruction: ...}",
    }
    message = f"its columns ({columns}) are no {needs} of a known form"
    hint = f"map them with data.columns: {example[purpose]}"
    if purpose == "demonstrations" and {"chosen", "rejected"} <= names:
        message = "holds preference pairs, and this stage needs demonstrations"
        hint = "use it for `align reward` or `align dpo`; to train on the chosen side map it: "
        single = "prompt" in names
        hint += (
            "columns: {prompt: prompt, completion: chosen}"
            if single
            else "columns: {messages: chosen}"
        )
    elif purpose == "preference" and _fitting(CANDIDATES["demonstrations"], names):
        message = "holds demonstrations, and this stage needs preference pairs"
        hint = "use it for `align sft`; `align sample` makes pairs from prompts"
    elif purpose != "prompts" and "prompt" in names:
        message = f"holds prompts only, and this stage needs {needs}"
        hint = f"`align sample` answers prompts; or map the columns: {example[purpose]}"
    fail(message, where=source.name, hint=hint)


def _first(source: Source, column: str, mapping: Mapping[str, str]) -> Any:
    """The first value of a column that is not empty."""
    name = mapping.get(column, column)
    if name not in source.dataset.column_names:
        return None
    values: Iterator[Any] = (value for value in source.dataset.select_columns(name)[:100][name])
    return next((value for value in values if value), None)


def _sentence(
    source: Source, form: Format, is_chat: bool, column: str, margin: bool, extras: Extras
) -> str:
    manner = "messages" if is_chat else "plain text without a chat template"
    pairs = "ranked answers" if column in RANKED else "preference pairs"
    generic = {
        "prompt_completion": f"prompts and completions in {manner}",
        "preference": f"{pairs} in {manner}",
        "prompts": f"prompts in {manner}",
    }
    said = generic.get(form) or SAID[form]
    said += " with a margin" if margin else ""
    said += extras.said()
    said += (
        ", those with a true `label`" if form == "prompt_completion" and _labelled(source) else ""
    )
    mapped = ", ".join(f"{ours} from {theirs}" for ours, theirs in (source.columns or {}).items())
    return f"{source.name}: {rows_of(len(source))} of {said}" + (f" ({mapped})" if mapped else "")


def _labelled(source: Source) -> bool:
    """Whether rows say if their completion is a good one (TRL's unpaired preferences)."""
    label = source.dataset.features.get("label")
    return isinstance(label, Value) and label.dtype == "bool"


def to_canonical(source: Source, form: Recognised, data: DataSection) -> Canonical:
    """The rows of a source as canonical rows, in order.

    Demonstrations become `messages`, `prompt` and `completion`, or `text`; pairs become `prompt`,
    `chosen`, `rejected` and, where known, `margin`; prompts become `prompt`, and all other columns
    are kept.

    Raises:
        AlignError: the first bad rows, each with file and number.
    """
    if data.system_prompt is not None and not form.chat:
        fail(
            f"needs chats, and {source.name} holds plain text",
            where="data.system_prompt",
            hint="map the columns to `instruction` (and `output`) to have chats, or leave it out",
        )
    known, mapping = source.dataset.features, source.columns or {}
    kept: dict[str, Any] = {}
    if form.purpose == "prompts":
        kept = {**known, **{ours: known[theirs] for ours, theirs in mapping.items()}}
        kept.pop("prompt", None)
        if form.extras.tools:
            kept.pop(TOOLS, None)
    new = {**_features(form), "_row": Value("int64"), "_problem": TEXT, "_idle": Value("bool")}
    features = Features({**kept, **new})
    dataset = source.dataset
    if form.format == "prompt_completion" and _labelled(source):
        good = np.flatnonzero(dataset["label"])
        dataset, source = dataset.select(good), source.take(good)
    made = dataset.map(
        partial(
            _convert_batch,
            form=form,
            system=data.system_prompt,
            mapping=mapping,
            kept=list(kept),
            known=form.extras.structured(known),
        ),
        batched=True,
        with_indices=True,
        remove_columns=[name for name in known if name not in kept],
        features=features,
        num_proc=data.dataset_num_proc,
        keep_in_memory=True,
        load_from_cache_file=False,
        new_fingerprint=f"canonical-{dataset._fingerprint}",
    )
    return _checked(made, source, form)


def _checked(made: Dataset, source: Source, form: Recognised) -> Canonical:
    """Raise what is wrong with the rows; leave out the few that teach nothing."""
    rows = np.asarray(made["_row"], dtype=np.int64)
    problems: list[Problem] = []
    left_out: list[Problem] = []
    for row, text, idle in zip(rows, made["_problem"], made["_idle"], strict=True):
        if text is not None:
            (left_out if idle else problems).append(Problem(text, source.where(int(row))))
    if len(left_out) > TOLERATED * len(source):
        problems += left_out
    raise_problems(problems)
    if left_out:
        sound = np.flatnonzero([text is None for text in made["_problem"]])
        made, rows = made.select(sound).flatten_indices(keep_in_memory=True), rows[sound]
    if not len(made):
        fail("holds no row that can be used", where=source.name)
    dataset = made.remove_columns(["_row", "_problem", "_idle"])
    return Canonical(dataset, form, source, rows, left_out)


def raise_problems(problems: Sequence[Problem]) -> None:
    """Raise the first problems, if there are any, with a word on how many more there are."""
    if not problems:
        return
    shown = list(problems[:MOST_PROBLEMS])
    if len(problems) > MOST_PROBLEMS:
        shown.append(Problem(f"... and {len(problems) - MOST_PROBLEMS:,} more rows with problems"))
    raise AlignError(*shown)


def _features(form: Recognised) -> dict[str, Any]:
    side = turns(form.extras) if form.chat else TEXT
    more = {TOOLS: TEXT} if form.extras.tools else {}
    if form.purpose == "prompts":
        return {"prompt": side} | more
    if form.purpose == "preference":
        features = {"prompt": side, "chosen": side, "rejected": side} | more
        return features | ({"margin": Value("float64")} if form.margin else {})
    if form.format == "prompt_completion":
        return {"prompt": side, "completion": side} | more
    return {"text": TEXT} if form.format == "text" else {"messages": side} | more


def _convert_batch(
    batch: Mapping[str, list[Any]],
    indices: list[int],
    *,
    form: Recognised,
    system: str | None,
    mapping: Mapping[str, str],
    kept: Sequence[str],
    known: Mapping[str, Any],
) -> dict[str, list[Any]]:
    names = [*_features(form), "_row", "_problem", "_idle"]
    made: dict[str, list[Any]] = {name: [] for name in names}
    for place, index in enumerate(indices):
        row = {name: values[place] for name, values in batch.items()}
        row |= {name: pruned(row[name], feature) for name, feature in known.items()}
        row |= {ours: row[theirs] for ours, theirs in mapping.items()}
        try:
            canonical = [{**item, "_row": index} for item in _completed(row, form, system)]
        except RowError as error:
            idle = isinstance(error, NothingToLearn)
            canonical = [{"_row": index, "_problem": str(error), "_idle": idle}]
        for item in canonical:
            for name in names:
                made[name].append(item.get(name))
    return {**{name: batch[mapping.get(name, name)] for name in kept}, **made}


def _completed(row: conversion.Row, form: Recognised, system: str | None) -> list[dict[str, Any]]:
    """The canonical rows of a row, with its functions, as a table holds them."""
    if not form.chat:
        return _convert(row, form, system)
    found = functions(row.get(TOOLS), TOOLS) if form.extras.tools else None
    more = {TOOLS: as_text(found)} if form.extras.tools else {}
    keys = form.extras.keys
    return [
        {
            name: [stored(turn, keys) for turn in value] if isinstance(value, list) else value
            for name, value in item.items()
        }
        | more
        for item in _convert(row, form, system)
    ]


def _convert(row: conversion.Row, form: Recognised, system: str | None) -> list[dict[str, Any]]:
    if form.purpose == "preference":
        if form.column in RANKED:
            return list(conversion.ranked(row, form.column, system))
        return list(conversion.pairs(row, form.chat, form.margin, system))
    if form.purpose == "prompts":
        return [{"prompt": _prompt(row, form, system)}]
    if form.format == "alpaca":
        return [conversion.alpaca(row, system)]
    if form.format == "text":
        return [{"text": conversion.text_of(row, "text")}]
    if form.format == "prompt_completion":
        return [conversion.prompt_completion(row, form.chat, system)]
    return [conversion.chat(row, form.column, system)]


def _prompt(row: conversion.Row, form: Recognised, system: str | None) -> Any:
    if form.format == "alpaca":
        return conversion.instruction(row, system)
    if form.chat:
        return conversion.chat_prompt(row, form.column, system)
    return conversion.text_of(row, form.column)
