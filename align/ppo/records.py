"""What a PPO run tells about its rollouts: figures in the log, and samples to read."""

import json
from collections.abc import Sequence
from pathlib import Path

from align.durable import write_text
from align.generation.answers import Prompt
from align.ppo.experience import Experience

SAMPLES = 8
"""Episodes of a rollout in samples.jsonl."""

LOGGED = {
    "score": "objective/scores",
    "reward": "objective/reward",
    "score_deviation": "objective/scores_std",
    "kl": "objective/kl",
    "kl_k3": "objective/kl_k3",
    "kl_per_token": "objective/kl_per_token",
    "kl_coef": "objective/kl_coef",
    "entropy": "objective/entropy",
    "length": "completions/mean_length",
    "eos_rate": "completions/eos_rate",
    "unique_rate": "completions/unique_rate",
    "value": "val/value",
    "return": "val/return",
    "explained_variance": "val/explained_variance",
    "clipped_scores": "objective/clipped_scores",
    "generate_seconds": "time/generate",
    "score_seconds": "time/score",
    "update_seconds": "time/update",
}
"""Figures of a rollout and their names in the log; TRL's names where it has the figure."""


def write_samples(file: Path, e: Experience, prompts: Sequence[Prompt]) -> None:
    """Add the first episodes of a rollout to a table of samples, a JSON object per line."""
    kl = ((e.logprobs - e.reference) * e.mask).sum(1)
    rows = [
        {
            "rollout": e.number,
            "prompt": prompts[episode.prompt].row["prompt"],
            "completion": episode.text,
            "score": float(e.scores[place]),
            "reward": float(e.rewards[place]),
            "kl": float(kl[place]),
            "ended": episode.ended,
        }
        for place, episode in enumerate(e.episodes[:SAMPLES])
    ]
    # Not splitlines: an answer may hold a line separator (U+2028), which JSON leaves as it is.
    kept = file.read_text(encoding="utf-8").split("\n")[:-1] if file.is_file() else []
    # A run that goes on from a checkpoint draws some rollouts a second time.
    kept = [line for line in kept if json.loads(line)["rollout"] < e.number]
    lines = [*kept, *(json.dumps(row, ensure_ascii=False) for row in rows)]
    write_text(file, "".join(f"{line}\n" for line in lines), flush=False)
