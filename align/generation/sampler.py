"""Samples completions of many prompts: each prompt is computed once, finished rows make room."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.streamers import BaseStreamer

from align.errors import fail
from align.generation.draws import Decoding, choose, refuse_nan, uniforms
from align.generation.heads import decoding_head
from align.generation.slots import Finished, Request, SlotBatch


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer."""

    ids: list[int]
    """Its tokens, without the stop token."""
    ended: bool
    """Whether it ended by itself and not at the limit."""
    stop_id: int | None = None
    """The token that ended it."""

    @property
    def all_ids(self) -> list[int]:
        """The tokens with the stop token, if there was one."""
        return self.ids if self.stop_id is None else [*self.ids, self.stop_id]


def sample_completions(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    num_generations: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    batch_size: int = 64,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[list[Completion]]:
    """Draw `num_generations` completions of each prompt.

    What is drawn depends on the seed, the prompt's index and the number of the sample only: another
    batch size, more samples, a part of the prompts or another number of processes give the same
    text, up to ties of floating-point numbers.

    Args:
        model: causal language model, or a PeftModel of one; its mode is put back afterwards.
        prompts: token ids of each prompt, none empty.
        max_new_tokens: a completion without a stop token is cut here.
        stop_ids: every token that ends a completion.
        pad_id: fills short prompts on the left, behind a mask.
        num_generations: samples per prompt.
        temperature: 0 is greedy; all samples of a prompt are then the same one.
        top_p: nucleus, as in transformers; 1 keeps all tokens.
        top_k: as in transformers, in front of `top_p`; 0 keeps all tokens.
        batch_size: completions written at once. A prompt is computed once, or, where its samples
            are more than half a batch, at most once for each quarter of a batch of them.
        seed: seed of the draws.
        indices: each prompt's index where the prompts are a part of a whole; 0, 1, ... when unset.
        on_batch: called after every `batch_size` completions, and at the end, with the numbers of
            completions and of tokens so far.

    Returns:
        For each prompt its completions, in the order of the prompts and of the samples.
    """
    decoding = Decoding(max_new_tokens, tuple(stop_ids), temperature, top_p, top_k)
    drawn = 1 if decoding.greedy else num_generations
    places = list(range(len(prompts)) if indices is None else indices)
    requests = _requests(prompts, places, drawn, batch_size)
    row_of = {place: row for row, place in enumerate(places)}
    found: list[list[Any]] = [[None] * drawn for _ in prompts]
    written = 0
    with inference(model), decoding_head(unwrapped(model)):
        writer = _in_slots if has_attention_caches(model) else _with_generate
        texts = writer(model, requests, decoding, batch_size=batch_size, pad_id=pad_id, seed=seed)
        for count, one in enumerate(texts, start=1):
            found[row_of[one.index]][one.sample] = _completion(one.ids, decoding)
            written += len(one.ids)
            if on_batch and (count % batch_size == 0 or count == len(prompts) * drawn):
                on_batch(count, written)
    return [row * (num_generations // drawn) for row in found]


def _requests(
    prompts: Sequence[Sequence[int]], places: Sequence[int], drawn: int, batch_size: int
) -> list[Request]:
    # Few large requests would wait for one another: a request needs as many free rows at once.
    at_once = drawn if 2 * drawn <= batch_size else max(1, batch_size // 4)
    requests = []
    for place, prompt in zip(places, prompts, strict=True):
        if not prompt:
            fail("the prompt has no tokens, so nothing can follow it", where=f"row {place + 1}")
        for first in range(0, drawn, at_once):
            requests.append(Request(place, prompt, range(first, min(first + at_once, drawn))))
    return requests


@contextmanager
def _own_settings(model: Any, decoding: Decoding, pad_id: int) -> Iterator[GenerationConfig]:
    """Settings for `generate` that leave every choice to `_Chosen`; the model's own come back.

    Whatever the checkpoint asks for (a repetition penalty, say) is not part of these draws.
    """
    config = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,
        eos_token_id=list(decoding.stop_ids),
        pad_token_id=pad_id,
    )
    base = unwrapped(model)
    asked, base.generation_config = base.generation_config, config
    try:
        yield config
    finally:
        base.generation_config = asked


@contextmanager
def inference(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode is put back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def has_attention_caches(model: Any) -> bool:
    """Whether every layer caches keys and values, so that the rows of its cache can be copied."""
    config = model.config
    if config.is_encoder_decoder or (
        getattr(model, "active_peft_config", None) is not None
        and (model.active_peft_config.is_prompt_learning)
    ):
        return False
    if getattr(unwrapped(model), "_is_stateful", False):
        return False
    layers = DynamicCache(config=config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def unwrapped(model: Any) -> Any:
    """The transformers model inside a PeftModel (adapters act inside its layers), or the model."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _completion(ids: list[int], decoding: Decoding) -> Completion:
    ended = ids[-1] in decoding.stop_ids
    return Completion(ids[:-1], True, ids[-1]) if ended else Completion(ids, False)


def _in_slots(
    model: Any,
    requests: list[Request],
    decoding: Decoding,
    *,
    batch_size: int,
    pad_id: int,
    seed: int,
) -> Iterator[Finished]:
    batch = SlotBatch(unwrapped(model), decoding, batch_size=batch_size, pad_id=pad_id, seed=seed)
    return batch.run(requests)


class _Chosen(LogitsProcessor):  # type: ignore[misc]
    """Leaves only the token that our own draw chooses, so that greedy generation takes it."""

    def __init__(self, uniform: torch.Tensor, decoding: Decoding, prompt_length: int) -> None:
        self.uniform, self.decoding, self.prompt_length = uniform, decoding, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.prompt_length
        token = choose(scores, self.uniform[:, step], self.decoding)
        refuse_nan(token, scores.shape[1])
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)


def _with_generate(
    model: Any,
    requests: list[Request],
    decoding: Decoding,
    *,
    batch_size: int,
    pad_id: int,
    seed: int,
) -> Iterator[Finished]:
    """The same draws through `generate`, for caches that cannot be copied row by row.

    Recurrent states know no padding, so a batch holds prompts of one length; a prompt is computed
    once for each sample.
    """
    device = next(model.parameters()).device
    with _own_settings(model, decoding, pad_id) as config:
        ordered = sorted(requests, key=lambda request: len(request.ids))
        for length, same in groupby(ordered, key=lambda request: len(request.ids)):
            places = [(r, sample) for r in same for sample in r.samples]
            for first in range(0, len(places), batch_size):
                part = places[first : first + batch_size]
                owners = [(request.index, sample) for request, sample in part]
                ids = torch.tensor([list(request.ids) for request, _ in part], device=device)
                uniform = uniforms(seed, owners, decoding.max_new_tokens).to(device)
                output = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=config,
                    logits_processor=LogitsProcessorList([_Chosen(uniform, decoding, length)]),
                )
                for owner, tokens in zip(owners, output[:, length:].tolist(), strict=True):
                    yield Finished(*owner, _until_stop(tokens, decoding.stop_ids))


class _Tokens(BaseStreamer):  # type: ignore[misc]
    """Hands on every token that `generate` writes, and not the prompt that it begins with."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self.on_token, self.prompt_is_next = on_token, True

    def put(self, value: torch.Tensor) -> None:
        """Take what `generate` gives: first the prompt, then token by token."""
        if not self.prompt_is_next:
            for token in value.flatten().tolist():
                self.on_token(token)
        self.prompt_is_next = False

    def end(self) -> None:
        """The last token has been given."""


def stream_completion(
    model: Any,
    prompt: Sequence[int],
    on_token: Callable[[int], None],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    place: tuple[int, int] = (0, 0),
) -> Completion:
    """Draw one completion and hand on each token, the stop token too, as soon as it is chosen.

    Args:
        model, max_new_tokens, stop_ids, pad_id, temperature, top_p, top_k, seed: as in
            `sample_completions`, which draws the same tokens.
        prompt: token ids, not empty.
        on_token: called with each token; what it raises (Ctrl-C) stops the drawing.
        place: index of the prompt and number of the sample, which the draws depend on.
    """
    decoding = Decoding(max_new_tokens, tuple(stop_ids), temperature, top_p, top_k)
    device = next(model.parameters()).device
    ids = torch.tensor([list(prompt)], device=device)
    uniform = uniforms(seed, [place], max_new_tokens).to(device)
    with inference(model), _own_settings(model, decoding, pad_id) as config:
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            logits_processor=LogitsProcessorList([_Chosen(uniform, decoding, len(prompt))]),
            streamer=_Tokens(on_token),
        )
    return _completion(output[0, len(prompt) :].tolist(), decoding)


def _until_stop(tokens: list[int], stop_ids: Sequence[int]) -> list[int]:
    """The tokens up to and with the first stop token; what follows is padding."""
    ends = (at for at, token in enumerate(tokens, start=1) if token in stop_ids)
    return tokens[: next(ends, len(tokens))]
