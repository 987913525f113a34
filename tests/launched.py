"""Recipes of four steps over sixteen rows, and commands that run them in processes of their own."""

import json
import os
import subprocess
from pathlib import Path

CHECKOUT = Path(__file__).parent.parent

REWARD = """
def letters(prompts, completions, **columns):
    return [sum(letter in "aeiou" for letter in text) / 12 for text in completions]
"""


def recipe(folder: Path, llama: Path, stage: str, batch: int) -> Path:
    if stage == "sft":
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"Count to {n}."},
                    {"role": "assistant", "content": " ".join(map(str, range(1, n + 1)))},
                ]
            }
            for n in range(2, 18)
        ]
    elif stage == "ppo":
        rows = [{"prompt": f"Name number {n}" + "!" * (n % 3)} for n in range(2, 18)]
    else:
        rows = [
            {
                "prompt": f"Name number {n}.",
                "chosen": f"It is {n}.",
                "rejected": "I do not know" + "!" * n,
            }
            for n in range(2, 18)
        ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "stage": stage,
        "output_dir": str(folder / f"out-{batch}"),
        "model": {"model_name_or_path": str(llama)},
        "lora": {"lora_r": 4},
        "data": {"dataset_name": str(data), "max_length": 256},
        "trainer": {
            "per_device_train_batch_size": batch,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "train_sampling_strategy": "sequential",
            "gradient_checkpointing": False,
            "logging_steps": 1,
        },
    }
    if stage == "ppo":
        reward = folder / "reward.py"
        reward.write_text(REWARD)
        config |= {
            "scorer": {"reward_funcs": {f"{reward}:letters": 1.0}},
            "generation": {"max_new_tokens": 12, "num_generations": 2},
            "num_mini_batches": 2,
            "num_ppo_epochs": 2,
        }
        config["trainer"] |= {"learning_rate": 1e-3, "gradient_accumulation_steps": 2}
    path = folder / f"recipe-{batch}.yaml"
    path.write_text(json.dumps(config))
    return path


def start(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(
        command,
        cwd=CHECKOUT,
        env={**clean, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def losses(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line and "step" in line][:4]
