"""The data set of the invented world: demonstrations and prompts as JSONL files.

    python -m align.tiny make-data --output datasets/tiny-world --seed 0

The prompts of `val` and `test` are the same for every seed, so results of different data seeds can
be compared; demonstrations and the prompts of `pref` and `rl` are drawn anew for each.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from align.tiny.world import Item, make_items, writer_answer

ROWS = {"sft": 2500, "pref": 2500, "rl": 640, "val": 300, "test": 400}
HELD_OUT_SEED = 2026


def prompt_row(item: Item) -> dict[str, Any]:
    """A prompt with what the judge has to know about it."""
    return {
        "prompt": [{"role": "user", "content": item.prompt}],
        "task": item.task,
        "item": item.to_json(),
    }


def prompt_rows(split: str, n: int, seed: int) -> list[dict[str, Any]]:
    """`n` prompts of a split."""
    return [prompt_row(item) for item in make_items(split, n, seed)]


def demonstration_rows(n: int, seed: int) -> list[dict[str, Any]]:
    """`n` conversations of the SFT split, answered by writers of mixed quality."""
    rng = random.Random(f"writers {seed}")
    return [
        {
            "messages": [
                {"role": "user", "content": item.prompt},
                {"role": "assistant", "content": writer_answer(item, rng)},
            ],
            "task": item.task,
        }
        for item in make_items("sft", n, seed)
    ]


def write_dataset(output: Path, seed: int) -> list[Path]:
    """Write one file per split to `output`; the same seed gives the same bytes."""
    output.mkdir(parents=True, exist_ok=True)
    paths = []
    for split, n in ROWS.items():
        held_out = split in ("val", "test")
        rows = (
            demonstration_rows(n, seed)
            if split == "sft"
            else prompt_rows(split, n, HELD_OUT_SEED if held_out else seed)
        )
        path = output / f"{split}.jsonl"
        _write_lines(path, rows)
        paths.append(path)
    return paths


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")
