"""What a PPO run remembers beside its optimizer, written into a checkpoint and read back bit by bit."""

import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file, save_file

from align.ppo.experience import load_experience

if TYPE_CHECKING:
    from align.ppo.trainer import PPOTrainer

WEIGHTS, STATE, GOOD = "trained.safetensors", "ppo_state.json", "last_good.safetensors"
"""Files of a checkpoint: trained weights, everything else that PPO remembers, the policy to go back to."""

OWN = ("kl_coef", "history", "raised", "halted", "left_alone", "good_rollout")
OF_THE_COLLECTOR = ("settled", "reward_mean", "reward_deviation")
OF_THE_FORWARD = ("padded", "own_logits")
"""Attributes that a checkpoint keeps: of the trainer, of its collector, of the way through the models."""


def save_state(trainer: "PPOTrainer", folder: Path) -> None:
    """Write trained weights, the rollout at hand and everything that the next steps depend on."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = trainer.roles.trained_state()
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / WEIGHTS)
    if trainer.good:
        save_file(trainer.good, folder / GOOD)
    if trainer.experience is not None:
        trainer.experience.save(folder)
    kept = {
        "trainer": {name: getattr(trainer, name) for name in OWN},
        "collector": {name: getattr(trainer.collector, name) for name in OF_THE_COLLECTOR},
        "forward": {name: getattr(trainer.collector.forward, name) for name in OF_THE_FORWARD},
        "logged": dict(trainer._logged),
    }
    (folder / STATE).write_text(json.dumps(kept), encoding="utf-8")


def load_state(trainer: "PPOTrainer", folder: Path) -> None:
    """Put back what `save_state` wrote.

    Raises:
        AlignError: the checkpoint trains other weights than this recipe.
    """
    trainer.roles.load_trained_state(load_file(folder / WEIGHTS))
    trainer.good = load_file(folder / GOOD) if (folder / GOOD).is_file() else {}
    trainer.experience = load_experience(folder)
    kept = json.loads((folder / STATE).read_text(encoding="utf-8"))
    for part, owner, names in (
        ("trainer", trainer, OWN),
        ("collector", trainer.collector, OF_THE_COLLECTOR),
        ("forward", trainer.collector.forward, OF_THE_FORWARD),
    ):
        for name in names:
            setattr(owner, name, kept[part][name])
    trainer._logged = defaultdict(list, kept["logged"])
