"""What became of the rows on their way to tokens: counts and lengths, and sentences about them."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class RenderStats:
    """Counts over the rows of a data set. Tokens are those of the kept rows."""

    rows: int
    """Rows that were read."""
    kept: int
    truncated: int = 0
    """Kept rows that were cut at `max_length`."""
    too_long: int = 0
    """Left out: longer than `max_length`, under truncation_mode `drop` or as a prompt."""
    idle: int = 0
    """Left out: an empty answer, or a pair whose sides are the same."""
    no_loss: int = 0
    """Left out: no token in the loss."""
    equal: int = 0
    """Left out: pairs that are the same after the cut."""
    escaped: int = 0
    """Rows in which control tokens written in a message were kept as text."""
    split: int = 0
    """Rows that were cut at the start of an answer, where a token reached across."""
    muted: int = 0
    """Kept rows with turns of the assistant that are marked as not learned."""
    foreign: int = 0
    """Kept rows with turns of others that are marked to be learned, and are not."""
    ended: int = 0
    """Kept rows whose last token in the loss ends a turn or the text (both sides of a pair)."""
    tokens: int = 0
    loss_tokens: int = 0
    length_min: int = 0
    length_median: int = 0
    length_p95: int = 0
    length_max: int = 0
    """Tokens of a kept row (of the longer side of a pair)."""

    @property
    def loss_share(self) -> float:
        """Tokens in the loss, as a share of all."""
        return self.loss_tokens / self.tokens if self.tokens else 0.0

    @property
    def ended_share(self) -> float:
        """Kept rows that end with an end-of-turn token, as a share of all."""
        return self.ended / self.kept if self.kept else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For metrics and JSON."""
        shares = {
            "loss_share": round(self.loss_share, 4),
            "ended_share": round(self.ended_share, 4),
        }
        return asdict(self) | shares


def lengths_of(lengths: Numbers) -> dict[str, int]:
    """Minimum, median, 95th percentile and maximum, as fields of RenderStats."""
    if not len(lengths):
        return {}
    low, median, high, top = np.percentile(lengths, [0, 50, 95, 100], method="inverted_cdf")
    named = {"length_min": low, "length_median": median, "length_p95": high, "length_max": top}
    return {name: int(value) for name, value in named.items()}


def rows_of(count: int) -> str:
    """`1 row`, `2,500 rows`."""
    return f"{count:,} {'row' if count == 1 else 'rows'}"


def sentences(stats: RenderStats, *, max_length: int | None, trains: bool) -> list[str]:
    """What a user has to know about the rows that were kept and left out."""
    said = [
        f"{stats.kept:,} of {rows_of(stats.rows)}, {stats.tokens:,} tokens; length "
        f"{stats.length_min} min, {stats.length_median} median, {stats.length_p95} p95, "
        f"{stats.length_max} max"
    ]
    if trains:
        said.append(f"{stats.loss_share:.1%} of the tokens are in the loss")
        ends = f"{stats.ended_share:.1%} of the rows end with an end-of-turn token"
        if stats.ended == 0:
            ends += ": the model will not learn to stop"
        said.append(ends)
    limit = f"longer than max_length ({max_length})"
    counted = (
        (stats.truncated, f"cut at the end: {limit}"),
        (stats.too_long, f"left out: {limit}"),
        (stats.no_loss, "left out: no token in the loss"),
        (stats.idle, "left out: nothing to learn (an empty answer, or two equal sides)"),
        (stats.equal, "left out: both sides are the same after the cut"),
        (stats.escaped, "with control tokens in their text, which were kept as text"),
        (stats.muted, "with answers that are marked as not learned: context, out of the loss"),
        (
            stats.foreign,
            "with turns of others than the assistant marked to be learned: they stay context "
            "(data.assistant_only_loss: false learns whole chats)",
        ),
        (stats.split, "tokenized in two parts, as a token reached across the start of an answer"),
    )
    said += [f"{rows_of(count)} {text}" for count, text in counted if count]
    return said
