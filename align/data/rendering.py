"""Canonical rows to token rows: what a stage really trains on, and what was cut or left out.

`training_rows` and `prompt_rows` are the doors of the data room for the stages.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from operator import or_
from typing import Any

import numpy as np
from datasets import Dataset
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from align.config.sections import DataSection
from align.data.counts import RenderStats, lengths_of, sentences
from align.data.extras import NONE
from align.data.fingerprint import SourceInfo, entries
from align.data.formats import recognise, to_canonical
from align.data.sequences import (
    render_completion,
    render_messages,
    render_pair,
    render_prompt,
    render_text,
)
from align.data.sources import SEED, Source, concatenate, load_sources, mixture
from align.data.token_rows import (
    PURPOSES,
    Kind,
    RenderedRows,
    check_some_kept,
    render_dataset,
    row_lengths,
)
from align.errors import fail

__all__ = [
    "RenderedData",
    "prompt_rows",
    "render_completion",
    "render_dataset",
    "render_messages",
    "render_pair",
    "render_prompt",
    "render_text",
    "training_rows",
]


@dataclass(frozen=True)
class RenderedData:
    """What a stage trains on."""

    train: Dataset
    test: Dataset | None
    """Rows for evaluation during training, where the recipe asks for them."""
    stats: RenderStats
    test_stats: RenderStats | None = None
    notes: list[str] = field(default_factory=list)
    """What was recognised, mixed, cut and left out, one sentence each."""
    sources: list[SourceInfo] = field(default_factory=list)
    """The files and Hub data sets, with their hashes."""

    def origin(self) -> dict[str, Any]:
        """Where the rows come from and what became of them, for lineage.json."""
        test = {"test": self.test_stats.as_dict()} if self.test_stats else {}
        sources = [asdict(info) for info in self.sources]
        return {"sources": sources, "train": self.stats.as_dict()} | test


def training_rows(
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    kind: Kind,
    *,
    assistant_only: bool = True,
    require_margin: bool = False,
    mask_format: bool = False,
) -> RenderedData:
    """Read, recognise, mix and render the rows of a training stage.

    Args:
        data: the recipe's data section.
        tokenizer: from `load_tokenizer`.
        kind: what the stage trains: `sft`, `reward` or `dpo`.
        assistant_only: the loss of chats is on assistant turns only.
        require_margin: pairs without a margin are an error.
        mask_format: pairs get `chosen_mask` and `rejected_mask`, which leave out what the chat
            template writes into the answers.

    Returns:
        Token rows: sft `input_ids`, `labels` (-100 outside the loss); reward `chosen_ids`,
        `rejected_ids` (whole sequences) and, where the rows have one, `margin`; dpo `prompt_ids`,
        `chosen_ids`, `rejected_ids`. Deterministic: a mixture is shuffled with a fixed seed.

    Raises:
        AlignError: anything wrong with the rows, each problem with file and row number.
    """
    options = {
        "assistant_only": assistant_only,
        "require_margin": require_margin,
        "mask_format": mask_format,
    }
    with _quiet():
        sources, notes = _mixed(data)
        held_out: list[Source] = []
        if data.dataset_test_split is not None:
            held_out, more = _mixed(data, data.dataset_test_split, most=False)
            notes += more
        elif data.test_split_size is not None:
            sources, held_out = _hold_out(sources, data.test_split_size)
        train = _render_all(sources, data, tokenizer, kind, notes, **options)
        test = _render_all(held_out, data, tokenizer, kind, [], **options) if held_out else None
    notes += sentences(train.stats, max_length=data.max_length, trains=True)
    if test is not None:
        notes.append(f"{test.stats.kept:,} rows for evaluation during training")
    # Train and test may be parts of the same files.
    infos = list(dict.fromkeys(info for source in (*sources, *held_out) for info in source.infos))
    test_rows, test_stats = (test.dataset, test.stats) if test else (None, None)
    return RenderedData(train.dataset, test_rows, train.stats, test_stats, notes, infos)


def prompt_rows(data: DataSection, tokenizer: PreTrainedTokenizerBase) -> RenderedData:
    """Read and render the prompts of `align sample` and `align eval`.

    Returns:
        `train` holds `prompt_ids`, `prompt` (messages or text) and every other column of the rows.
        Prompts longer than `max_length` are left out and counted.

    Raises:
        AlignError: anything wrong with the rows, each problem with file and row number.
    """
    with _quiet():
        sources, notes = _mixed(data)
        rows = _render_all(sources, data, tokenizer, "prompts", notes)
    notes += sentences(rows.stats, max_length=data.max_length, trains=False)
    infos = list(dict.fromkeys(info for source in sources for info in source.infos))
    return RenderedData(rows.dataset, None, rows.stats, notes=notes, sources=infos)


class _quiet:
    """Without the progress bars of `datasets`, which report nothing that a user asked for."""

    def __enter__(self) -> None:
        self.shown = not are_progress_bars_disabled()
        disable_progress_bars()

    def __exit__(self, *_: object) -> None:
        if self.shown:
            enable_progress_bars()


def _mixed(
    data: DataSection, split: str | None = None, *, most: bool = True
) -> tuple[list[Source], list[str]]:
    """The rows that the recipe takes of each source, and a sentence on each share of a mixture."""
    sources = load_sources(data, split)
    weights = [entry.weight for entry in entries(data, split)]
    given = [weight for weight in weights if weight is not None]
    sizes = [len(source) for source in sources]
    chosen = mixture(sizes, given or None, data.max_samples if most else None)
    taken = [source.take(rows) for source, rows in zip(sources, chosen, strict=True)]
    total = sum(map(len, taken))
    notes = [
        f"{source.name}: {len(source):,} of {size:,} rows, {len(source) / total:.1%} of the mixture"
        for source, size in zip(taken, sizes, strict=True)
        if len(taken) > 1
    ]
    return taken, notes


def _hold_out(sources: Sequence[Source], size: float) -> tuple[list[Source], list[Source]]:
    """Split rows off at random for evaluation, from every source the same share.

    `size` is that share where it is below 1, else the number of rows in all.

    Rows of one prompt stay together: a reward model that has trained on one pair of a prompt has
    seen the prompt of the others.
    """
    generator = np.random.default_rng(SEED)
    kept, held = [], []
    share = size if size < 1 else size / sum(map(len, sources))
    for source in sources:
        prompts = _prompts(source)
        count = max(round(len(source) * share), 1)
        order = generator.permutation(prompts.max() + 1)
        sizes = np.bincount(prompts)[order].cumsum()
        chosen = order[: int(np.searchsorted(sizes, count)) + 1]
        inside = np.isin(prompts, chosen)
        if inside.all():
            fail(
                f"{size:g} of {len(source)} rows leaves none to train on",
                where="data.test_split_size",
                hint="make it smaller, or give a split of its own with data.dataset_test_split",
            )
        held.append(source.take(np.flatnonzero(inside)))
        kept.append(source.take(np.flatnonzero(~inside)))
    return kept, held


def _prompts(source: Source) -> NDArray[np.int64]:
    """For each row the number of its prompt; without a column of prompts every row has its own."""
    column = (source.columns or {}).get("prompt", "prompt")
    if column not in source.dataset.column_names:
        return np.arange(len(source))
    numbers: dict[str, int] = {}
    texts = (json.dumps(prompt, sort_keys=True) for prompt in source.dataset[column])
    return np.array([numbers.setdefault(text, len(numbers)) for text in texts])


def _render_all(
    sources: Sequence[Source],
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    kind: Kind,
    notes: list[str],
    **options: bool,
) -> RenderedRows:
    parts = []
    forms = [recognise(source, PURPOSES[kind]) for source in sources]
    # One table holds the prompts of all sources, whatever some of them lack.
    together = reduce(or_, (form.extras for form in forms if form.chat), NONE)
    for source, form in zip(sources, forms, strict=True):
        notes.append(form.sentence)
        if kind == "prompts" and form.chat:
            form = replace(form, extras=replace(together, column=form.extras.column))
        parts.append(to_canonical(source, form, data))
        notes += [f"left out: {problem}" for problem in parts[-1].left_out[:3]]
    rendered = [
        render_dataset(part, tokenizer, data, kind, check=False, **options) for part in parts
    ]
    if len(rendered) == 1:
        rows = rendered[0]
    else:
        tables = [part.dataset for part in rendered]
        if kind != "prompts" and not all("margin" in table.column_names for table in tables):
            tables = [t.remove_columns({"margin"} & set(t.column_names)) for t in tables]
        joined = concatenate(tables, "data.datasets")
        shuffled = joined.shuffle(seed=SEED, keep_in_memory=True).flatten_indices(
            keep_in_memory=True
        )
        rows = RenderedRows(shuffled, _added([part.stats for part in rendered], shuffled, kind))
    check_some_kept(rows.stats, data, sources[0].name if len(sources) == 1 else "data.datasets")
    return rows


def _added(stats: Sequence[RenderStats], dataset: Dataset, kind: Kind) -> RenderStats:
    summed = {name: sum(getattr(item, name) for item in stats) for name in asdict(stats[0])}
    return RenderStats(**summed | lengths_of(row_lengths(dataset, kind)))
