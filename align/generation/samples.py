"""Every sample of a run in parquet: parts while it goes on, one file at the end."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from align.durable import sync
from align.generation.answers import Answer, Group, Prompt

SCHEMA = pa.schema(
    [
        ("prompt_index", pa.int64()),
        ("sample", pa.int64()),
        ("prompt", pa.string()),
        ("row", pa.string()),
        ("completion", pa.string()),
        ("ids", pa.list_(pa.int32())),
        ("stop_id", pa.int32()),
        ("tokens", pa.int64()),
        ("ended", pa.bool_()),
        ("score", pa.float64()),
        ("verdict", pa.string()),
        ("kept", pa.bool_()),
    ]
)
"""Columns: `prompt` is text or the messages as JSON, `row` the other columns as JSON, `tokens`
counts the stop token too, `verdict` holds every part of the score as JSON."""


class PartFiles:
    """The parts of a run: each holds the samples of `size` prompts and is there in full or not."""

    def __init__(self, folder: Path, prompts: Sequence[Prompt], size: int) -> None:
        self.folder = folder
        self.parts = [prompts[first : first + size] for first in range(0, len(prompts), size)]

    def missing(self) -> list[int]:
        """Numbers of the parts that are still to be drawn."""
        return [n for n in range(len(self.parts)) if not self._path(n).exists()]

    def write(self, number: int, groups: Sequence[Group]) -> None:
        """Write a part in one step."""
        rows = [
            _record(prompt, sample, answer)
            for prompt, group in zip(self.parts[number], groups, strict=True)
            for sample, answer in enumerate(group.answers)
        ]
        write_tables(self._path(number), SCHEMA, [pa.Table.from_pylist(rows, schema=SCHEMA)])

    def join(self, target: Path) -> None:
        """Write all parts into one file, a part at a time."""
        numbers = range(len(self.parts))
        write_tables(target, SCHEMA, (pq.read_table(self._path(number)) for number in numbers))

    def groups(self) -> Iterator[Group]:
        """The groups of all parts, in the order of the prompts."""
        columns = ["prompt_index", "completion", "ids", "stop_id", "verdict", "kept"]
        for number in range(len(self.parts)):
            rows = pq.read_table(self._path(number), columns=columns).to_pylist()
            for index, same in groupby(rows, key=itemgetter("prompt_index")):
                yield Group(index, [_answer(row) for row in same])

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.parquet"


def _answer(row: Mapping[str, Any]) -> Answer:
    verdict = json.loads(row["verdict"])
    return Answer(row["completion"], row["ids"], row["stop_id"], verdict, row["kept"])


def _record(prompt: Prompt, sample: int, answer: Answer) -> dict[str, Any]:
    return {
        **prompt_columns(prompt),
        "sample": sample,
        "completion": answer.text,
        "ids": answer.ids,
        "stop_id": answer.stop_id,
        "tokens": len(answer.all_ids),
        "ended": answer.ended,
        "score": answer.verdict["score"],
        "verdict": as_json(answer.verdict),
        "kept": answer.kept,
    }


def prompt_columns(prompt: Prompt) -> dict[str, Any]:
    """A prompt's index, text and row, as parquet files hold them."""
    asked = prompt.row["prompt"]
    rest = {key: value for key, value in prompt.row.items() if key != "prompt"}
    text = asked if isinstance(asked, str) else as_json(asked)
    return {"prompt_index": prompt.index, "prompt": text, "row": as_json(rest)}


def as_json(value: Any) -> str:
    """Compact JSON; what JSON does not know (a date, say) becomes text."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines in one step."""
    temporary = _beside(path)
    with temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(as_json(row) + "\n")
    _put(temporary, path)


def write_tables(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Write tables into one parquet file, which appears when all are in it."""
    temporary = _beside(path)
    with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)
    _put(temporary, path)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.new")


def _put(temporary: Path, path: Path) -> None:
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)
