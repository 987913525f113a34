"""The shipped data set: regenerated to the byte, described by its card, disjoint by composition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from align.tiny.__main__ import main
from align.tiny.dataset import ROWS, demonstration_rows, prompt_rows
from align.tiny.judge import item_of

SHIPPED = Path(__file__).parents[2] / "datasets" / "tiny-world"


def _read(split: str) -> list[dict[str, Any]]:
    lines = (SHIPPED / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_shipped_files_regenerate(tmp_path: Path) -> None:
    main(["make-data", "--output", str(tmp_path), "--seed", "0"])
    for split in ROWS:
        name = f"{split}.jsonl"
        assert (tmp_path / name).read_bytes() == (SHIPPED / name).read_bytes()


def test_the_card_describes_the_files() -> None:
    card = yaml.safe_load((SHIPPED / "card.yaml").read_text(encoding="utf-8"))
    assert (card["name"], card["license"]) == ("tiny-world", "apache-2.0")
    assert {split: entry["rows"] for split, entry in card["splits"].items()} == ROWS
    for split, entry in card["splits"].items():
        rows = _read(split)
        assert entry["file"] == f"{split}.jsonl"
        assert len(rows) == entry["rows"]
        content = "messages" if entry["format"] == "messages" else "prompt"
        assert all(content in row and set(row) <= set(card["columns"]) for row in rows)


def test_the_files_are_small() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 1_500_000


def test_prompts_agree_with_their_items_and_splits() -> None:
    for split in ("pref", "rl", "val", "test"):
        for row in _read(split):
            item = item_of(row)
            assert row["prompt"] == [{"role": "user", "content": item.prompt}]
            assert (row["task"], split) == (item.task, item.split)


def test_demonstrations_are_not_held_out_prompts() -> None:
    held_out = {row["prompt"][0]["content"] for s in ("val", "test") for row in _read(s)}
    assert not any(row["messages"][0]["content"] in held_out for row in _read("sft"))


def test_seeds_change_the_demonstrations() -> None:
    assert demonstration_rows(50, 0) != demonstration_rows(50, 1)
    assert prompt_rows("rl", 50, 0) != prompt_rows("rl", 50, 1)
