"""A batch of rows that each write one completion, and a key-value cache whose rows come and go.

All rows share the column that is written next: a row's own tokens end there and begin at its
`start`, with a mask over what lies before. So a prompt is computed once and copied to its samples,
a finished row makes room for the next prompt, and nobody waits for the longest completion.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from align.generation.draws import Decoding, choose, refuse_nan, uniforms

HEADROOM = 32
"""Free columns of a new cache: what a row has written is copied once in so many steps."""

IDLE_SHARE = 0.25
"""Prompts are fetched, or the batch is cut, when this share of the rows has nothing to do."""


@dataclass(frozen=True, slots=True)
class Request:
    """Some samples of one prompt."""

    index: int
    """Place of the prompt among all prompts; the draws depend on it."""
    ids: Sequence[int]
    samples: range


@dataclass(frozen=True, slots=True)
class Finished:
    """A completion that came to its end."""

    index: int
    sample: int
    ids: list[int]
    """Every token, the stop token included."""


@dataclass
class _Window:
    """The columns that attention reads, the same ones in every layer."""

    first: int
    """Before it no row has a token any more."""
    end: int
    """The column that is written next."""


class _Columns(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values, written in place where a DynamicLayer copies all of them."""

    def __init__(self, window: _Window, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.window, self.keys, self.values = window, keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new columns; the window moves on after the last layer."""
        begin, end = self.window.end, self.window.end + key_states.shape[-2]
        self.keys[:, :, begin:end] = key_states
        self.values[:, :, begin:end] = value_states
        read = slice(self.window.first, end)
        return self.keys[:, :, read], self.values[:, :, read]

    def get_seq_length(self) -> int:
        """Columns that attention reads."""
        return self.window.end - self.window.first


@dataclass
class _Rows:
    """What is known of each row; every field has one entry a row."""

    owner: torch.Tensor
    """Prompt index and sample, [rows, 2]."""
    start: torch.Tensor
    """First column with a token of the row."""
    position: torch.Tensor
    """Position of the last token in its sequence."""
    last: torch.Tensor
    """The last token."""
    age: torch.Tensor
    """Completion tokens in front of the next one; in front of the last one when done."""
    done: torch.Tensor
    """Whether the row has nothing to do."""
    tokens: torch.Tensor
    """The completion so far, [rows, max_new_tokens]."""
    uniform: torch.Tensor
    """The numbers that decide its tokens, [rows, max_new_tokens]."""

    def take(self, rows: torch.Tensor) -> "_Rows":
        return _Rows(*(getattr(self, field.name)[rows] for field in fields(self)))

    def put(self, rows: torch.Tensor, other: "_Rows") -> None:
        for field in fields(self):
            getattr(self, field.name)[rows] = getattr(other, field.name)


class SlotBatch:
    """Writes completions with a causal language model all of whose layers have attention caches."""

    def __init__(
        self, model: Any, decoding: Decoding, *, batch_size: int, pad_id: int, seed: int
    ) -> None:
        self.model, self.decoding, self.pad_id, self.seed = model, decoding, pad_id, seed
        self.batch_size = batch_size
        self.device = next(model.parameters()).device
        self.stops = torch.tensor(decoding.stop_ids, dtype=torch.long, device=self.device)
        self.active = 0
        self.ragged = False
        none = torch.zeros(0, dtype=torch.long, device=self.device)
        self.rows = self._new_rows([], none, none)
        self.window = _Window(0, 0)
        self.cache = Cache(layers=[])

    def run(self, requests: Sequence[Request]) -> Iterator[Finished]:
        """Write the samples of all requests; each completion is yielded as soon as it ends."""
        # The longest prompt comes first, so one that does not fit into memory says so at once, and
        # a later prompt is never longer than the rows that it joins.
        queue = sorted(requests, key=lambda request: len(request.ids))
        while queue or self.active:
            idle = len(self.rows.done) - self.active
            if idle >= IDLE_SHARE * len(self.rows.done):
                if queue:
                    yield from self._seat(self._admit(queue))
                else:
                    self._rebuild((~self.rows.done).nonzero().squeeze(1))
            if self.active:
                yield from self._step()

    def _admit(self, queue: list[Request]) -> list[Request]:
        """Take requests off the queue while the batch has room; an empty one always has."""
        room = len(self.rows.done) - self.active if self.active else self.batch_size
        admitted: list[Request] = []
        while queue and len(queue[-1].samples) <= room:
            admitted.append(queue.pop())
            room -= len(admitted[-1].samples)
        return admitted

    def _seat(self, requests: list[Request]) -> Iterator[Finished]:
        """Compute the prompts and copy each to a row for every sample; choose the first tokens."""
        if not requests:
            return
        prompts = {request.index: request.ids for request in requests}
        lengths = torch.tensor([len(ids) for ids in prompts.values()], device=self.device)
        width = int(lengths.max())
        logits, filled = self._prefill(list(prompts.values()), lengths, width)
        places = [(request.index, sample) for request in requests for sample in request.samples]
        row_of = {index: row for row, index in enumerate(prompts)}
        copies = torch.tensor([row_of[index] for index, _ in places], device=self.device)
        if self.active == 0:
            self._open(filled, len(places), width)
        end = self.window.end
        new = self._new_rows(places, end - lengths[copies], lengths[copies] - 1)
        if self.active == 0:
            self.rows = new
            seats = torch.arange(len(places), device=self.device)
        else:
            seats = self.rows.done.nonzero().squeeze(1)[: len(places)]
            self.rows.put(seats, new)
        for layer, prompt in zip(self.cache.layers, filled.layers, strict=True):
            for buffer, block in ((layer.keys, prompt.keys), (layer.values, prompt.values)):
                # What an earlier row left in front is finite, and the mask covers it.
                buffer[seats, :, end - width : end] = block[copies]
        self.active += len(places)
        self._narrow()
        yield from self._accept(logits[copies], seats)

    def _prefill(
        self, prompts: list[Sequence[int]], lengths: torch.Tensor, width: int
    ) -> tuple[torch.Tensor, DynamicCache]:
        """Run the prompts, padded on the left: the logits behind them, and their cache."""
        padded = [[self.pad_id] * (width - len(ids)) + list(ids) for ids in prompts]
        mask = torch.arange(width, device=self.device) >= (width - lengths)[:, None]
        cache = DynamicCache()
        output = self.model(
            input_ids=torch.tensor(padded, device=self.device),
            attention_mask=None if bool(mask.all()) else mask.long(),
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1], cache

    def _open(self, prompts: DynamicCache, rows: int, width: int) -> None:
        """Buffers for a new batch, shaped after the prompts' cache."""
        self.window = _Window(0, width)
        layers = []
        for layer in prompts.layers:
            _, heads, _, size = layer.keys.shape
            shape = (rows, heads, width + HEADROOM)
            keys = layer.keys.new_empty((*shape, size))
            values = layer.values.new_empty((*shape, layer.values.shape[-1]))
            layers.append(_Columns(self.window, keys, values))
        self.cache = Cache(layers=layers)

    def _new_rows(
        self, places: list[tuple[int, int]], start: torch.Tensor, position: torch.Tensor
    ) -> _Rows:
        steps = self.decoding.max_new_tokens
        zeros = torch.zeros(len(places), dtype=torch.long, device=self.device)
        return _Rows(
            owner=torch.tensor(places, dtype=torch.long, device=self.device).view(-1, 2),
            start=start,
            position=position,
            last=zeros,
            age=zeros.clone(),
            done=zeros.bool(),
            tokens=zeros[:, None].repeat(1, steps),
            uniform=uniforms(self.seed, places, steps).to(self.device),
        )

    def _rebuild(self, kept: torch.Tensor) -> None:
        """New buffers with room for more columns, with the rows `kept` and the columns in use."""
        self._narrow()
        first, end = self.window.first, self.window.end
        used, width = slice(first, end), end - first
        self.window = _Window(0, width)
        self.rows = self.rows.take(kept)
        self.rows.start = (self.rows.start - first).clamp(min=0)
        for at, layer in enumerate(self.cache.layers):
            moved = []
            for old in (layer.keys, layer.values):
                new = old.new_empty((len(kept), old.shape[1], width + HEADROOM, old.shape[3]))
                new[:, :, :width] = old[kept, :, used]
                moved.append(new)
            self.cache.layers[at] = _Columns(self.window, *moved)

    def _narrow(self) -> None:
        """Let attention begin at the first column that a working row still needs."""
        starts = self.rows.start[~self.rows.done]
        self.window.first = int(starts.min())
        self.ragged = bool((starts > self.window.first).any())

    def _step(self) -> Iterator[Finished]:
        """One token for every row."""
        rows = self.rows
        if self.window.end == self.cache.layers[0].keys.shape[2]:
            self._rebuild(torch.arange(len(rows.done), device=self.device))
            rows = self.rows
        end = self.window.end + 1
        mask = None
        if self.ragged:
            columns = torch.arange(self.window.first, end, device=self.device)
            mask = (columns >= rows.start[:, None]).long()
        logits = self.model(
            input_ids=rows.last[:, None],
            attention_mask=mask,
            position_ids=rows.position[:, None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        self.window.end = end
        yield from self._accept(logits, torch.arange(len(rows.done), device=self.device))

    def _accept(self, logits: torch.Tensor, seats: torch.Tensor) -> Iterator[Finished]:
        """Choose the next token of the rows in `seats` and yield the completions that it ends."""
        rows = self.rows
        age, done = rows.age[seats], rows.done[seats]
        uniform = rows.uniform[seats, age]
        token = choose(logits, uniform, self.decoding)
        rows.tokens[seats, age] = token
        rows.last[seats] = token
        # Tokens drawn from NaN end the row too, and are refused where the rows are looked at.
        stopped = (token[:, None] == self.stops).any(1) | (token >= logits.shape[1])
        over = (stopped | (age == self.decoding.max_new_tokens - 1)) & ~done
        going = ~(done | over)
        rows.done[seats] = ~going
        rows.age[seats] += going
        rows.position[seats] += going
        ended = seats[over]
        self.active -= len(ended)
        if len(ended):
            refuse_nan(rows.tokens[ended], logits.shape[1])
            counts = (rows.age[ended] + 1).tolist()
            owners, tokens = rows.owner[ended].tolist(), rows.tokens[ended].tolist()
            for (index, sample), ids, count in zip(owners, tokens, counts, strict=True):
                yield Finished(index, sample, ids[:count])
