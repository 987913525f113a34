"""Preference pairs whose prompt is computed once, against the same step on TRL's padded rows: reward training and DPO.

    python benchmarks/pairs.py [--turns 5] [--steps 12]

One process, one thread, the two ways in turn (A B A B), medians; both train the same start, and the losses of all steps
are compared. Pairs are two writers' answers to a prompt of the tiny world, sorted by length as `group_by_length`
does; `long prompts` puts a system text of 200 tokens in front. Reward training is of all weights, DPO of an
adapter. Writes results/pairs.json and .md.
"""

import argparse
import json
import platform
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, TaskType
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from trl import DPOConfig, RewardConfig

from align.data.sequences import render_pair
from align.models.quick_lora import quicken
from align.tiny.world import make_items, writer_answer
from align.training.trainers import DPOTrainer, RewardTrainer

HERE = Path(__file__).parent
BASE = HERE.parent / "recipes" / "tiny" / "base"
BATCH = 16
SYSTEM = "Answer kindly, shortly and truly. " * 25
QUIET = {"report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
LORA = {"r": 32, "lora_alpha": 64, "target_modules": "all-linear"}


def pairs(steps: int, system: str) -> list[dict[str, list[int]]]:
    """Prompts with two answers, in token ids, by length."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    rng, rows = random.Random(0), []
    for item in make_items("sft", steps * BATCH, 0):
        prompt = [{"role": "user", "content": item.prompt}]
        prompt = [{"role": "system", "content": system}, *prompt] if system else prompt
        answers = [[{"role": "assistant", "content": writer_answer(item, rng)}] for _ in range(2)]
        ids, chosen, rejected = render_pair(tokenizer, prompt, *answers)
        rows.append({"prompt_ids": ids, "chosen_ids": chosen, "rejected_ids": rejected})
    rows.sort(key=lambda row: max(len(row["chosen_ids"]), len(row["rejected_ids"])))
    return rows


def trainer_of(kind: str, rows: list[dict[str, list[int]]], padding_free: bool) -> Any:
    """A trainer of the stage's own kind on the tiny base."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    common = {"processing_class": tokenizer, "padding_free": padding_free}
    if kind == "dpo":
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32),
            args=DPOConfig("runs/bench-pairs", max_length=None, **QUIET),
            train_dataset=Dataset.from_list(rows),
            peft_config=LoraConfig(task_type=TaskType.CAUSAL_LM, **LORA),
            **common,
        )
        quicken(trainer.model)
        return trainer
    whole = [
        {side: row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids")}
        for row in rows
    ]
    return RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(
            BASE, num_labels=1, dtype=torch.float32
        ),
        args=RewardConfig("runs/bench-pairs", max_length=None, **QUIET),
        train_dataset=Dataset.from_list(whole),
        **common,
    )


def train(trainer: Any) -> tuple[float, list[float]]:
    """Processor seconds and losses of one pass over the rows, batch by batch."""
    rows = trainer.train_dataset
    batches = [
        trainer.data_collator([rows[row] for row in range(first, first + BATCH)])
        for first in range(0, len(rows), BATCH)
    ]
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    optimizer, losses = torch.optim.AdamW(weights, 5e-4), []
    trainer.model.train()
    start = time.process_time()
    for batch in batches:
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return time.process_time() - start, losses


def tokens_of(trainer: Any, rows: list[dict[str, list[int]]]) -> tuple[int, int]:
    """Tokens of all batches, padded and as the backbone gets them without padding."""
    from align.training.pairs import share

    padded = computed = 0
    for first in range(0, len(rows), BATCH):
        batch = trainer.data_collator(
            [trainer.train_dataset[row] for row in range(first, first + BATCH)]
        )
        padded += batch["input_ids"].numel()
        computed += share(batch["input_ids"], batch["attention_mask"]).ids.numel()
    return padded, computed


def measure(kind: str, system: str, turns: int, steps: int) -> dict[str, Any]:
    rows = pairs(steps, system)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    losses: dict[bool, list[float]] = {}
    for turn in range(turns + 1):
        for free in (False, True):
            trainer = trainer_of(kind, rows, free)
            taken, losses[free] = train(trainer)
            assert trainer.shares_prompts is free
            if turn:  # the first warms up
                seconds[free].append(taken / steps)
    usual, tokens = tokens_of(trainer, rows)
    gaps = [abs(one - other) for one, other in zip(losses[True], losses[False], strict=True)]
    before, after = (statistics.median(seconds[free]) for free in (False, True))
    return {
        "padded": {"tokens": usual, "seconds_a_step": before},
        "padding_free": {"tokens": tokens, "seconds_a_step": after},
        "fewer_tokens": usual / tokens,
        "speed": before / after,
        "largest_difference_of_a_loss": max(gaps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        f"{kind}, {name}": measure(kind, system, options.turns, options.steps)
        for kind in ("reward", "dpo")
        for name, system in {"tiny world": "", "long prompts": SYSTEM}.items()
    }
    environment = {"torch": torch.__version__, "machine": platform.machine(), "threads": 1}
    results = {"environment": environment, "turns": options.turns, "steps": options.steps} | found
    (HERE / "results" / "pairs.json").write_text(json.dumps(results, indent=2) + "\n")
    lines = [
        "# Preference pairs whose prompt is computed once, against padded rows",
        "",
        f"Made by `python benchmarks/pairs.py`: batches of {BATCH} pairs, one thread, float32;",
        f"processor seconds, medians of {options.turns} turns of {options.steps} steps, taken in turn.",
        "",
        "| pairs | tokens, padded | tokens | fewer | speed | largest difference of a loss |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {row['padded']['tokens']:,} | {row['padding_free']['tokens']:,} | {row['fewer_tokens']:.2f}x "
            f"| {row['speed']:.2f}x | {row['largest_difference_of_a_loss']:.1e} |"
            for name, row in found.items()
        ),
    ]
    (HERE / "results" / "pairs.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
