"""A rollout: episodes with their tokens, log-probabilities, values, scores and advantages."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(slots=True)
class Episode:
    """One answer to one prompt."""

    prompt: int
    """Place of the prompt in the data set."""
    prompt_ids: list[int]
    completion_ids: list[int]
    """Its tokens, with the stop token where there was one; never empty."""
    ended: bool
    """Whether it ended its turn by itself."""
    text: str
    """The completion without control tokens."""

    @property
    def answer_ids(self) -> list[int]:
        """The completion without the stop token."""
        return self.completion_ids[:-1] if self.ended else self.completion_ids


@dataclass(slots=True)
class Experience:
    """A whole rollout; every process holds all of it. E episodes, T completion tokens of the longest."""

    number: int
    """Rollouts before this one."""
    episodes: list[Episode]
    mask: Tensor
    """1 where an episode has a token, [E, T], float32 like all tensors here, on the CPU."""
    logprobs: Tensor
    """Of the drawn tokens under the policy that drew them, [E, T]."""
    reference: Tensor
    """Under the reference, [E, T]."""
    entropy: Tensor
    """Of the policy at each token, nats, [E, T]."""
    values: Tensor
    """[E, T]."""
    scores: Tensor
    """What the scorers gave, before any change, [E]."""
    rewards: Tensor = field(default_factory=lambda: torch.zeros(0))
    """Scores as they are used: normalized, clipped, with the rule for unfinished answers, [E]."""
    advantages: Tensor = field(default_factory=lambda: torch.zeros(0))
    """[E, T]."""
    returns: Tensor = field(default_factory=lambda: torch.zeros(0))
    """What the values should have been, [E, T]."""

    @property
    def lengths(self) -> Tensor:
        """Tokens of each completion, [E]."""
        return self.mask.sum(1)

    def save(self, folder: Path) -> None:
        """Write it into a checkpoint folder, so that the updates after it can go on bit by bit."""
        tensors = {
            item.name: getattr(self, item.name).contiguous()
            for item in fields(self)
            if isinstance(getattr(self, item.name), Tensor)
        }
        save_file(tensors, folder / TENSORS)
        episodes = [
            [e.prompt, e.prompt_ids, e.completion_ids, e.ended, e.text] for e in self.episodes
        ]
        content = {"number": self.number, "episodes": episodes}
        (folder / EPISODES).write_text(json.dumps(content), encoding="utf-8")


TENSORS, EPISODES = "rollout.safetensors", "rollout.json"


def load_experience(folder: Path) -> Experience | None:
    """What `Experience.save` left in a checkpoint folder; None where there is nothing."""
    if not (folder / EPISODES).is_file():
        return None
    content = json.loads((folder / EPISODES).read_text(encoding="utf-8"))
    episodes = [Episode(*entry) for entry in content["episodes"]]
    tensors: dict[str, Any] = load_file(folder / TENSORS)
    return Experience(content["number"], episodes, **tensors)


def rows_of(columns: list[Tensor], lengths: list[int], width: int) -> Tensor:
    """Per-token values, episode after episode, as padded rows.

    Args:
        columns: one tensor per batch, shape [tokens of its episodes].
        lengths: tokens of each episode, in the order of the batches.
        width: T.

    Returns:
        [E, T], 0 behind the ends.
    """
    flat = torch.cat(columns).float().cpu()
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    found = torch.zeros(mask.shape)
    found[mask] = flat
    return found
