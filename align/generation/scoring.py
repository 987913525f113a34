"""Scores of whole sequences in sorted batches: rewards, and log-probabilities of completions."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from align.errors import fail
from align.generation.sampler import inference, unwrapped

LOGITS_AT_ONCE = 2**28
"""Logits held at once (1 GiB in float32); a batch is split further where its logits are more."""


class RewardScorer:
    """Reads rewards from a sequence classifier with one label, at the last token of a sequence."""

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, *, sharded: bool = False
    ) -> None:
        """With `sharded` only passes of the whole model are made, in which its weights are brought together: every
        process has to ask for as many sequences as the others."""
        self.model = model
        self.sharded = sharded
        self.pad_id = int(tokenizer.pad_token_id)
        self._base = unwrapped(model)
        self._device = next(model.parameters()).device

    def score(self, sequences: Sequence[Sequence[int]], batch_size: int = 64) -> list[float]:
        """The reward of each sequence of token ids, whatever batch it is computed in.

        The place of the last token follows from the sequence's length. transformers looks for the
        last id that is not the pad token's instead, which fails where a text ends in that token.
        """
        rewards = [0.0] * len(sequences)
        # Buffers of sharded weights that are made in inference mode could not be used in training.
        quick = torch.inference_mode(not self.sharded)
        with inference(self.model), quick, torch.no_grad():
            for places in by_length([len(s) for s in sequences], batch_size):
                batch = self._score_batch([sequences[place] for place in places])
                for place, reward in zip(places, batch, strict=True):
                    rewards[place] = reward
        return rewards

    def _score_batch(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        lengths = torch.tensor([len(s) for s in sequences], device=self._device)
        if not bool((lengths > 0).all()):
            fail("a sequence without tokens has no reward")
        width = int(lengths.max())
        padded = [[*ids, *[self.pad_id] * (width - len(ids))] for ids in sequences]
        ids = torch.tensor(padded, device=self._device)
        mask = (torch.arange(width, device=self._device) < lengths[:, None]).long()
        head = getattr(self._base, "score", None)
        if head is None or self.sharded:  # encoders have pooling of their own, which reads the mask
            logits = self.model(input_ids=ids, attention_mask=mask).logits
        else:
            backbone = getattr(self._base, self._base.base_model_prefix)
            hidden = backbone(input_ids=ids, attention_mask=mask, use_cache=False)[0]
            last = hidden[torch.arange(len(ids), device=self._device), lengths - 1]
            logits = head(last.to(next(head.parameters()).dtype))
        rewards: list[float] = logits.float().view(len(ids), -1)[:, 0].tolist()
        return rewards


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Places in batches of like length, the longest first."""
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    for first in range(0, len(order), batch_size):
        yield order[first : first + batch_size]


def token_logprobs(
    model: Any,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    batch_size: int = 64,
    temperature: float = 1.0,
) -> list[list[float]]:
    """Log-probability of every completion token after its prompt.

    Args:
        model: causal language model or PeftModel; its mode is put back afterwards.
        prompts: token ids in front of each completion, none empty.
        completions: token ids, with the stop token where there was one.
        batch_size: sequences at once; fewer where their logits would not fit (`LOGITS_AT_ONCE`).
        temperature: divides the logits, as it did when the tokens were drawn.

    Returns:
        For each completion one number per token.
    """
    found: list[list[float]] = [[] for _ in completions]
    vocabulary = int(unwrapped(model).config.get_text_config().vocab_size)
    longest = max(map(len, completions), default=0) + 1
    rows = max(1, min(batch_size, LOGITS_AT_ONCE // (longest * vocabulary)))
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    with inference(model):
        for places in by_length(lengths, rows):
            inside = [place for place in places if completions[place]]
            if inside:
                batch = [(prompts[place], completions[place]) for place in inside]
                for place, values in zip(
                    inside, _batch_logprobs(model, batch, temperature), strict=True
                ):
                    found[place] = values
    return found


def sequence_logprobs(
    model: Any,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    batch_size: int = 64,
    temperature: float = 1.0,
) -> list[float]:
    """Summed log-probability of each completion; arguments as `token_logprobs`."""
    values = token_logprobs(
        model, prompts, completions, batch_size=batch_size, temperature=temperature
    )
    return [sum(row) for row in values]


def _batch_logprobs(
    model: Any, batch: Sequence[tuple[Sequence[int], Sequence[int]]], temperature: float
) -> list[list[float]]:
    # Padded on the left, so that the completions end in the same column and only the logits of
    # the last columns are computed.
    device = next(model.parameters()).device
    width = max(len(prompt) + len(completion) for prompt, completion in batch)
    kept = max(len(completion) for _, completion in batch)
    rows = [[0] * (width - len(p) - len(c)) + [*p, *c] for p, c in batch]
    starts = torch.tensor([width - len(p) - len(c) for p, c in batch], device=device)
    ids = torch.tensor(rows, device=device)
    mask = torch.arange(width, device=device) >= starts[:, None]
    output = unwrapped(model)(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=kept + 1,
    )
    logits = output.logits[:, -kept - 1 : -1].float() / temperature
    targets = ids[:, -kept:]
    chosen = logits.gather(2, targets[:, :, None]).squeeze(2) - logits.logsumexp(2)
    values = chosen.tolist()
    return [row[kept - len(c) :] for row, (_, c) in zip(values, batch, strict=True)]
