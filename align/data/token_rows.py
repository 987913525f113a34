"""Canonical rows of one source to token rows: cut, left out, counted."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from align.config.sections import DataSection
from align.data.conversations import Tools
from align.data.counts import RenderStats, lengths_of
from align.data.exact import TOOLS
from align.data.formats import Canonical, Purpose, raise_problems
from align.data.sequences import Answered, Rendered, Renderer
from align.errors import Problem, fail

Kind = Literal["sft", "reward", "dpo", "prompts"]

PURPOSES: dict[Kind, Purpose] = {
    "sft": "demonstrations",
    "reward": "preference",
    "dpo": "preference",
    "prompts": "prompts",
}
IDS = List(Value("int32"))
TOKEN_COLUMNS: dict[Kind, tuple[str, ...]] = {
    "sft": ("input_ids", "labels"),
    "reward": ("chosen_ids", "rejected_ids"),
    "dpo": ("prompt_ids", "chosen_ids", "rejected_ids"),
    "prompts": ("prompt_ids",),
}
"""The token columns of each kind, lists of ids (labels: -100 outside the loss)."""
MASK_COLUMNS = ("chosen_mask", "rejected_mask")
"""With masked format tokens: 1 for every token of an answer that is in the loss."""

COUNTED = ("truncated", "escaped", "split", "ended", "muted", "foreign", "tokens", "loss_tokens")
BOOKKEEPING = {"fate", "problem", "hint", *COUNTED}
"""Columns (with a leading underscore) that say what became of a row."""

FATES = ("kept", "too_long", "no_loss", "equal")
BATCH = 1000
LOOKS_RENDERED = 0.5
"""Share of `text` rows with control tokens from which on they are taken for rendered chats."""


@dataclass(frozen=True)
class RenderedRows:
    """Token rows with the counts of what became of the rows."""

    dataset: Dataset
    stats: RenderStats


def row_lengths(dataset: Dataset, kind: Kind) -> Any:
    """Tokens of each row; of the longer side of a pair."""
    columns = TOKEN_COLUMNS[kind]
    sizes = {name: np.asarray(pc.list_value_length(dataset.data[name])) for name in columns}
    if kind in ("sft", "prompts"):
        return sizes[columns[0]]
    longer = np.maximum(sizes["chosen_ids"], sizes["rejected_ids"])
    return longer + sizes["prompt_ids"] if kind == "dpo" else longer


def render_dataset(
    rows: Canonical,
    tokenizer: PreTrainedTokenizerBase,
    data: DataSection,
    kind: Kind,
    *,
    assistant_only: bool = True,
    require_margin: bool = False,
    mask_format: bool = False,
    check: bool = True,
) -> RenderedRows:
    """Canonical rows of one source as token rows; `mask_format` adds the columns of the masks.

    Rows longer than `max_length` are cut at the end or left out (`truncation_mode`). Rows without a
    token in the loss are left out, and so are pairs that the cut made equal; all are counted.

    Raises:
        AlignError: the template refuses rows, no row is left (with `check`), or there is no margin.
    """
    if require_margin and not rows.form.margin:
        fail(
            "its pairs have no margin, and `use_margin` needs one",
            where=rows.source.name,
            hint="map a column with data.columns: {margin: ...}, or set use_margin: false",
        )
    columns = rows.dataset.column_names
    kept = Features({n: rows.dataset.features[n] for n in _kept_columns(columns, kind)})
    bookkeeping = {"_fate": Value("int8"), "_problem": Value("string"), "_hint": Value("string")}
    counted = {f"_{name}": Value("int32") for name in COUNTED}
    tokens = dict.fromkeys(TOKEN_COLUMNS[kind], IDS)
    masks = dict.fromkeys(MASK_COLUMNS, List(Value("int8"))) if mask_format else {}
    made = rows.dataset.map(
        partial(
            _render_batch,
            renderer=Renderer(tokenizer),
            kind=kind,
            assistant_only=assistant_only,
            max_length=data.max_length,
            drop=data.truncation_mode == "drop",
            mask_format=mask_format,
        ),
        batched=True,
        batch_size=BATCH,
        remove_columns=[name for name in columns if name not in kept],
        features=Features({**kept, **tokens, **masks, **bookkeeping, **counted}),
        num_proc=data.dataset_num_proc,
        keep_in_memory=True,
        load_from_cache_file=False,
        new_fingerprint=f"rendered-{rows.dataset._fingerprint}",
    )
    raise_problems(
        [
            Problem(text, rows.where(index), hint)
            for index, (text, hint) in enumerate(zip(made["_problem"], made["_hint"], strict=True))
            if text is not None
        ]
    )
    return _finished(made, rows, data, kind, check)


def _kept_columns(columns: Sequence[str], kind: Kind) -> list[str]:
    if kind == "prompts":
        return list(columns)
    return ["margin"] if kind == "reward" and "margin" in columns else []


def _finished(
    made: Dataset, rows: Canonical, data: DataSection, kind: Kind, check: bool
) -> RenderedRows:
    fates = np.asarray(made["_fate"])
    kept = np.flatnonzero(fates == FATES.index("kept"))
    counted = {name: np.asarray(made[f"_{name}"]) for name in COUNTED}
    own = [name for name in made.column_names if name.startswith("_") and name[1:] in BOOKKEEPING]
    dataset = made.remove_columns(own)
    if len(kept) < len(made):
        dataset = dataset.select(kept).flatten_indices(keep_in_memory=True)
    stats = RenderStats(
        rows=len(made) + len(rows.left_out),
        kept=len(kept),
        idle=len(rows.left_out),
        **{fate: int((fates == place).sum()) for place, fate in enumerate(FATES) if place},
        **{name: int(values[kept].sum()) for name, values in counted.items()},
        **lengths_of(row_lengths(dataset, kind)) if len(kept) else {},
    )
    if rows.form.format == "text" and counted["escaped"].sum() >= LOOKS_RENDERED * len(made):
        fail(
            "its texts hold control tokens: they look like chats that are rendered already",
            where=rows.source.name,
            hint="give the chats themselves, as `messages`; control tokens in a text stay text",
        )
    if check:
        check_some_kept(stats, data, rows.source.name)
    return RenderedRows(dataset, stats)


def check_some_kept(stats: RenderStats, data: DataSection, where: str) -> None:
    if stats.kept:
        return
    reasons = (
        (stats.too_long, f"longer than max_length ({data.max_length})"),
        (
            stats.no_loss,
            f"no token in the loss within max_length ({data.max_length}), or every answer marked "
            "as not learned",
        ),
        (stats.equal, "both sides the same after the cut"),
    )
    found = "; ".join(f"{count:,} {text}" for count, text in reasons if count)
    fail(
        f"no row is left to use: every label of its {stats.rows:,} rows is masked ({found})",
        where=where,
        hint="raise data.max_length, or look at the rows with `align inspect`",
    )


def _render_batch(
    batch: Mapping[str, list[Any]],
    *,
    renderer: Renderer,
    kind: Kind,
    assistant_only: bool,
    max_length: int | None,
    drop: bool,
    mask_format: bool,
) -> dict[str, list[Any]]:
    """Token columns and bookkeeping of a batch of canonical rows."""
    limit = _Limit(max_length, drop)
    if kind == "sft":
        rows = [_sft_row(item, limit) for item in _demonstrations(batch, renderer, assistant_only)]
    elif kind == "prompts":
        asked_for = renderer.prompts(batch["prompt"], _tools(batch))
        rows = [_prompt_row(item, limit) for item in asked_for]
    else:
        sides = zip(batch["chosen"], batch["rejected"], strict=True)
        asked = list(zip(batch["prompt"], sides, strict=True))
        pairs = renderer.answers(asked, formats=mask_format, tools=_tools(batch))
        rows = [_pair_row(item, limit, kind) for item in pairs]
    columns = [*TOKEN_COLUMNS[kind], *(MASK_COLUMNS if mask_format else ())]
    names = [*columns, "_fate", "_problem", "_hint", *(f"_{name}" for name in COUNTED)]
    defaults: dict[str, Any] = {name: [] for name in columns}
    defaults |= {f"_{name}": 0 for name in COUNTED}
    made = {name: [row.get(name, defaults.get(name)) for row in rows] for name in names}
    return {**{name: batch[name] for name in _kept_columns(list(batch), kind)}, **made}


@dataclass(frozen=True)
class _Limit:
    max_length: int | None
    drop: bool

    def exceeded(self, length: int) -> bool:
        return self.max_length is not None and length > self.max_length


def _demonstrations(
    batch: Mapping[str, list[Any]], renderer: Renderer, assistant_only: bool
) -> list[Rendered | Problem]:
    tools = _tools(batch)
    if "messages" in batch:
        return renderer.chats(batch["messages"], whole=not assistant_only, tools=tools)
    if "text" in batch:
        return renderer.texts(batch["text"])
    prompts, completions = batch["prompt"], batch["completion"]
    if isinstance(prompts[0], str):
        return renderer.completions(prompts, completions)
    chats = [[*prompt, *answer] for prompt, answer in zip(prompts, completions, strict=True)]
    return renderer.chats(chats, first=[len(prompt) for prompt in prompts], tools=tools)


def _tools(batch: Mapping[str, list[Any]]) -> list[Tools] | None:
    """The functions of each canonical chat of a batch."""
    if TOOLS not in batch or isinstance(batch.get("prompt", [None])[0], str):
        return None
    known: dict[str | None, Tools] = {None: None}
    for text in batch[TOOLS]:
        if text not in known:
            known[text] = json.loads(text)
    return [known[text] for text in batch[TOOLS]]


def _lost(fate: str) -> dict[str, Any]:
    return {"_fate": FATES.index(fate)}


def _wrong(problem: Problem) -> dict[str, Any]:
    return {"_fate": 0, "_problem": problem.message, "_hint": problem.hint}


def _sft_row(item: Rendered | Problem, limit: _Limit) -> dict[str, Any]:
    if isinstance(item, Problem):
        return _wrong(item)
    ids, mask, cut = item.input_ids, item.loss_mask, limit.exceeded(len(item.input_ids))
    if cut:
        if limit.drop:
            return _lost("too_long")
        ids, mask = ids[: limit.max_length], mask[: limit.max_length]
    # The first token is never predicted, so it is in no loss.
    if not any(mask[1:]):
        return _lost("no_loss")
    return {
        "input_ids": ids,
        "labels": [token if on else -100 for token, on in zip(ids, mask, strict=True)],
        "_fate": 0,
        "_truncated": int(cut),
        "_escaped": int(item.escaped),
        "_split": int(item.split),
        "_muted": int(item.muted),
        "_foreign": int(item.foreign),
        "_ended": int(item.ended and sum(mask) == sum(item.loss_mask)),
        "_tokens": len(ids),
        "_loss_tokens": sum(mask),
    }


def _prompt_row(item: list[int] | Problem, limit: _Limit) -> dict[str, Any]:
    if isinstance(item, Problem):
        return _wrong(item)
    if limit.exceeded(len(item)):
        return _lost("too_long")
    return {"prompt_ids": item, "_fate": 0, "_tokens": len(item)}


def _pair_row(item: Answered | Problem, limit: _Limit, kind: Kind) -> dict[str, Any]:
    if isinstance(item, Problem):
        return _wrong(item)
    prompt, answers = item.prompt_ids, item.completions
    cut = limit.exceeded(len(prompt) + max(map(len, answers)))
    if cut and limit.drop:
        return _lost("too_long")
    if cut and limit.max_length is not None:
        room = limit.max_length - len(prompt)
        if room < 1:
            return _lost("no_loss")
        answers = [answer[:room] for answer in answers]
    chosen, rejected = answers
    if chosen == rejected:
        return _lost("equal")
    whole = kind == "reward"
    columns = {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected}
    if not whole:
        columns = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
    formats = item.formats or [[0] * len(answer) for answer in answers]
    masks = [[1 - f for f in mask[: len(a)]] for mask, a in zip(formats, answers, strict=True)]
    if not all(map(any, masks)):
        return _lost("no_loss")
    if item.formats is not None:
        columns |= dict(zip(MASK_COLUMNS, masks, strict=True))
    shortened = any(len(a) < len(b) for a, b in zip(answers, item.completions, strict=True))
    return {
        **columns,
        "_fate": 0,
        "_truncated": int(cut),
        "_escaped": int(item.escaped),
        "_split": int(item.split),
        "_ended": int(item.ended and not shortened),
        "_tokens": 2 * len(prompt) + len(chosen) + len(rejected),
        "_loss_tokens": sum(map(sum, masks)),
    }
