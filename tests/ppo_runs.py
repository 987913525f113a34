"""Small PPO runs for tests: prompts, a recipe, the parts of a trainer, and what a run left behind."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from align.generation.answers import load_prompts
from align.models.tokenizer import load_tokenizer
from align.ppo.casting import cast_roles, make_scorer
from align.ppo.trainer import PPOTrainer
from align.registry import REWARD_FUNCS
from align.runs import RunFolder
from align.stages.ppo import PPOConfig
from align.training.fitting import fit

LETTER = "a"


def letters(completions: list[str], **_: Any) -> list[float]:
    """Share of one letter among the characters of each answer."""
    return [text.count(LETTER) / max(1, len(text)) for text in completions]


def codes(completions: list[str], **_: Any) -> list[float]:
    """A number that hardly two texts share."""
    return [sum(map(ord, text)) % 97 / 97 for text in completions]


REWARD_FUNCS.setdefault("test_letters", letters)
REWARD_FUNCS.setdefault("test_codes", codes)


def merged(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """A recipe with changes; an empty section replaces the other one."""
    found = dict(base)
    for key, value in more.items():
        both = value and isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = merged(found[key], value) if both else value
    return found


def write_prompts(folder: Path, count: int = 8) -> str:
    """Chat prompts of different lengths."""
    path = folder / "prompts.jsonl"
    rows = [
        {"prompt": [{"role": "user", "content": f"say {n}" + "!" * (n % 5)}]} for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def ppo_config(llama: Path, folder: Path, **more: Any) -> PPOConfig:
    """Rollouts of eight episodes, two updates each, four updates in all."""
    data = folder / "prompts.jsonl"
    base = {
        "output_dir": str(folder / "ppo"),
        "model": {"model_name_or_path": str(llama)},
        "lora": {"lora_r": 4, "lora_alpha": 8},
        "data": {"dataset_name": str(data) if data.is_file() else write_prompts(folder)},
        "generation": {"max_new_tokens": 8},
        "scorer": {"reward_funcs": {"test_codes": 1.0}},
        "trainer": {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "gradient_checkpointing": False,
            "logging_steps": 1,
        },
        "num_mini_batches": 2,
        "sample_rollouts": 1,
    }
    return PPOConfig.model_validate(merged(base, more))


def make_trainer(config: PPOConfig) -> PPOTrainer:
    """The stage's trainer, ready to fit."""
    torch.manual_seed(config.trainer.seed)
    folder = RunFolder(config, quiet=True)
    tokenizer = load_tokenizer(config.model)
    prompts = load_prompts(config.data, tokenizer, folder)
    roles = cast_roles(config, tokenizer, prompts)
    scorer = make_scorer(config, roles, prompts, tokenizer)
    return PPOTrainer(config, roles, tokenizer, prompts, scorer, folder)


def trained(config: PPOConfig) -> PPOTrainer:
    """The stage's trainer after its run."""
    trainer = make_trainer(config)
    fit(trainer, trainer.folder)
    return trainer


def weights(trainer: PPOTrainer, part: str = "") -> dict[str, torch.Tensor]:
    """Copies of the trained weights whose names hold `part`."""
    state = trainer.roles.trained_state()
    return {name: weight.clone() for name, weight in state.items() if part in name}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are equal bit by bit."""
    return first.keys() == second.keys() and all(
        torch.equal(weight, second[name]) for name, weight in first.items()
    )


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Lines of a file of a run folder."""
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def figures(folder: Path, key: str) -> list[float]:
    """A logged figure, step by step."""
    return [line[key] for line in lines(folder) if key in line]


def artifact_weights(artifact: Path) -> dict[str, torch.Tensor]:
    """The artifact's own weights."""
    return {
        name: weight
        for file in sorted(artifact.glob("*.safetensors"))
        for name, weight in load_file(file).items()
    }
