"""Parts are there in full or not at all, and give back what was put in."""

import datetime
import json

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.generation.answers import Answer, Group, Prompt
from align.generation.samples import PartFiles, as_json, write_lines

PROMPTS = [
    Prompt(index, [1, 2], {"prompt": [{"role": "user", "content": f"Why {index}?"}], "n": index})
    for index in range(5)
]


def group(index: int) -> Group:
    verdict = {"score": index / 10, "polite": 1.0}
    return Group(
        index,
        [
            Answer("yes", [7, 8], 4, verdict, kept=True),
            Answer("", [], 4, verdict),
            Answer("cut \u2028 \x1b", [9], None, verdict),
        ],
    )


def test_parts_give_back_the_groups_in_order(tmp_path):
    parts = PartFiles(tmp_path, PROMPTS, 2)
    assert parts.missing() == [0, 1, 2]
    for number in (2, 0, 1):
        parts.write(number, [group(prompt.index) for prompt in parts.parts[number]])
    assert parts.missing() == []
    assert list(parts.groups()) == [group(index) for index in range(5)]
    parts.join(tmp_path / "all.parquet")
    rows = pq.read_table(tmp_path / "all.parquet").to_pylist()
    assert [row["prompt_index"] for row in rows] == [n for n in range(5) for _ in range(3)]
    assert rows[0]["prompt"] == '[{"role":"user","content":"Why 0?"}]'
    assert json.loads(rows[3]["row"]) == {"n": 1}
    assert [row["tokens"] for row in rows[:3]] == [3, 1, 1]
    assert [row["ended"] for row in rows[:3]] == [True, True, False]


def test_a_torn_file_is_no_part(tmp_path):
    parts = PartFiles(tmp_path, PROMPTS, 3)
    (tmp_path / ".part-00000.parquet.1.new").write_bytes(b"PAR1")
    assert parts.missing() == [0, 1]


def test_a_part_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    parts = PartFiles(tmp_path, PROMPTS, 5)
    with pytest.raises(ValueError, match="zip"):
        parts.write(0, [group(0)])
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=40, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=3), st.text(), max_size=3), max_size=5))
def test_json_lines_hold_one_row_a_line(tmp_path_factory, rows):
    file = tmp_path_factory.mktemp("lines") / "rows.jsonl"
    write_lines(file, rows)
    lines = file.read_bytes().split(b"\n")
    assert lines.pop() == b""
    assert [json.loads(line) for line in lines] == rows


def test_what_json_does_not_know_becomes_text():
    assert as_json({"day": datetime.date(2020, 1, 2)}) == '{"day":"2020-01-02"}'
