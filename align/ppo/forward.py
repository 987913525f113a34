"""Log-probabilities and hidden states of completions, by the quickest way that gives the model's own numbers."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from align.generation.sampler import unwrapped
from align.ppo.experience import Episode
from align.training.flat import (
    Flat,
    can_flatten,
    flatten,
    hidden_states,
    in_rows,
    segments_attended,
)
from align.training.logprobs import HeadPass, head_pass, linear_logprobs

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}
"""How far log-probabilities may lie from the model's own: at most in float32, in the mean in reduced precision."""


class Forward:
    """One way through a model for all passes of a run, so that equal weights give equal numbers.

    Without padding and without logits where that agrees with the model's own forward pass (`settle`), else with
    padding, else with the model's own logits (heads that scale or cap them).

    Args:
        temperature: the one of the draws; divides every logit.
    """

    def __init__(self, model: Any, temperature: float) -> None:
        self.temperature = temperature
        self.padded = not can_flatten(model)
        self.own_logits = False

    def batch(self, episodes: Sequence[Episode], device: torch.device) -> Flat:
        """Prompts and completions of some episodes, end to end."""
        return flatten(
            [episode.prompt_ids for episode in episodes],
            [episode.completion_ids for episode in episodes],
            device,
        )

    def attending(self, model: Any) -> AbstractContextManager[Any]:
        """Wrap forward and backward pass in it."""
        return nullcontext() if self.padded else segments_attended(model)

    def hidden(self, model: Any, flat: Flat) -> Tensor:
        """Last hidden states of all tokens, shape [N, d]."""
        return hidden_states(model, flat, padded=self.padded)

    def completions(
        self, model: Any, flat: Flat, *, entropy: bool = True, known: HeadPass | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Log-probability and entropy of every completion token, [n], and the states in front of them, [n, d].

        Args:
            known: what `first_pass` found for the same batch. Where the states are the very same as then, the head
                is not needed again; entropies are then None.
        """
        if self.own_logits:
            return self._by_logits(model, flat)
        rows = self.hidden(model, flat)[flat.rows]
        logprobs = None if known is None else known.again(rows)
        if logprobs is not None:
            return logprobs, None, rows
        head = unwrapped(model).get_output_embeddings()
        logprobs, entropies = linear_logprobs(
            rows, head.weight, flat.targets, temperature=self.temperature, entropy=entropy
        )
        return logprobs, entropies, rows

    def first_pass(self, model: Any, flat: Flat) -> HeadPass | None:
        """The head over a batch that is learned from before any weight changes, with all that this needs of it.

        None where the head is trained, or where the model's own logits are used.
        """
        head = unwrapped(model).get_output_embeddings()
        if self.own_logits or head.weight.requires_grad:
            return None
        rows = self.hidden(model, flat)[flat.rows]
        found: HeadPass = head_pass(rows, head.weight, flat.targets, temperature=self.temperature)
        return found

    def _by_logits(self, model: Any, flat: Flat) -> tuple[Tensor, Tensor, Tensor]:
        mask, ids, positions = in_rows(flat)
        output = unwrapped(model)(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=positions,
            use_cache=False,
            output_hidden_states=True,
        )
        logits = output.logits[
            mask.nonzero(as_tuple=True)[0][flat.rows], positions[mask][flat.rows]
        ]
        logs = (logits.float() / self.temperature).log_softmax(-1)
        entropy = -(logs.detach().exp() * logs.detach()).sum(-1)
        chosen = logs.gather(1, flat.targets[:, None]).squeeze(1)
        return chosen, entropy, output.hidden_states[-1][mask][flat.rows]

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def settle(self, model: Any, episodes: Sequence[Episode]) -> float:
        """Compare with the model's own logits on a few episodes, and fall back as far as needed.

        Returns:
            The largest difference that is left.
        """
        device = next(model.parameters()).device
        flat = self.batch(episodes, device)
        wanted = self._by_logits(model, flat)[0]
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else unwrapped(model).dtype
        allowed = TOLERANCE.get(dtype, 1e-3)
        ways = [(False, False)] if not self.padded else []
        ways = [*ways, (True, False), (True, True)]
        if hasattr(unwrapped(model).get_output_embeddings(), "lora_A"):
            # `weight` is the base's; what the adapter adds is zero at first, and numbers would not tell.
            ways = ways[-1:]
        for padded, own in ways:
            self.padded, self.own_logits = padded, own
            gaps = (self.completions(model, flat)[0] - wanted).abs()
            # Reduced precision rounds single tokens in each way by its own eighth of a nat.
            difference = float(gaps.max() if dtype is torch.float32 else gaps.mean())
            if difference <= allowed:
                return difference
        return difference
