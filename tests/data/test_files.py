"""Files of rows, and what is said of the broken ones."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data.files import read_table
from align.errors import AlignError

ROWS = [{"question": "one?", "answer": "1"}, {"question": "two?", "answer": "2"}]


def save(rows: list[dict], path: Path) -> Path:
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif path.suffix == ".csv":
        lines = ["question,answer", *(f'"{row["question"]}",{row["answer"]}' for row in rows)]
        path.write_text("\n".join(lines), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".arrow"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix):
    assert read_table(save(ROWS, tmp_path / f"rows{suffix}")).to_pylist() == ROWS


def test_arrow_files_with_a_footer_are_read_too(tmp_path):
    table = pa.Table.from_pylist(ROWS)
    with ipc.new_file(str(tmp_path / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert read_table(tmp_path / "rows.arrow").to_pylist() == ROWS


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.json", '{"a": 1}\n{"a": 2}\n', [{"a": 1}, {"a": 2}]),
        ("b.json", '{"data": [{"a": 1}, {"a": 2}]}', [{"a": 1}, {"a": 2}]),
        ("c.jsonl", '\ufeff{"a": 1}\n', [{"a": 1}]),
        ("d.jsonl", '{"a": 1}\n{"b": 2.5}\n', [{"a": 1, "b": None}, {"a": None, "b": 2.5}]),
        ("e.jsonl", '{"a": "2020-01-01"}', [{"a": "2020-01-01"}]),
        ("f.csv", "a,b\n007,no\n", [{"a": "007", "b": "no"}]),
        ("g.csv", 'a\n"two\nlines"\n', [{"a": "two\nlines"}]),
        ("h.jsonl", '{"m": [{"r": "u"}]}\n{"m": [{"r": "u", "x": null}]}', None),
    ],
)
def test_values_stay_what_they_are(tmp_path, name, content, rows):
    (tmp_path / name).write_text(content, encoding="utf-8")
    table = read_table(tmp_path / name)
    assert rows is None or table.to_pylist() == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', r"a.jsonl row 2: is not JSON"),
        ("b.jsonl", '{"a": 1}\n\n[1]\n', r"b.jsonl row 2: is a list and not an object"),
        ("c.jsonl", '{"a": "x"}\n{"a": null}\n{"a": 3}\n', r"row 3: column `a` holds a number, "),
        ("d.jsonl", '{"a": [{"b": 1}]}\n{"a": [{"b": "x"}]}\n', r"row 2: column `a` holds a list"),
        ("e.jsonl", '{"a": "\\ud800"}\n', r"row 1: column `a` holds text that is not valid Uni"),
        (
            "n.jsonl",
            '{"a": 1' + "0" * 30 + "}",
            r"row 1: column `a` .* that is too large",
        ),
        ("f.jsonl", "", r"f.jsonl: holds no rows"),
        ("g.json", '[{"a": 1}, 2]', r"g.json row 2: is a number and not an object"),
        ("h.json", '{"a": ', r"h.json: is not JSON"),
        ("i.csv", "a,b\n1,2\n3\n", r"i.csv row 2: has 1 fields, and the header has 2"),
        ("j.csv", "a,b\n1,2,3\n", r"j.csv row 1: has 3 fields"),
        ("o.csv", "a;b\n1;2,5\n", r"o.csv: separates its columns by semicolons"),
        ("p.csv", "a\tb\n1\t2\n", r"p.csv: separates its columns by tabs"),
        ("k.csv", 'a,b\n1,"2\n', r"k.csv row 1: is not CSV"),
        ("l.parquet", "no parquet", r"l.parquet: is no sound parquet file"),
        ("m.arrow", "no arrow", r"m.arrow: is no sound arrow file"),
    ],
)
def test_a_broken_file_is_named_with_its_row(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(AlignError, match=message):
        read_table(tmp_path / name)


def test_text_in_another_encoding_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"a": "é"}'.encode("latin-1"))
    with pytest.raises(AlignError, match="is not UTF-8 text"):
        read_table(tmp_path / "a.jsonl")


def test_ten_problems_are_told_at_once(tmp_path):
    (tmp_path / "a.jsonl").write_text("no\n" * 50, encoding="utf-8")
    with pytest.raises(AlignError) as caught:
        read_table(tmp_path / "a.jsonl")
    assert len(caught.value.problems) == 10


names = st.sampled_from("abc")
plain = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3)
values = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=80, deadline=None)
@given(rows=st.lists(st.dictionaries(names, values, min_size=1), min_size=1, max_size=4))
def test_any_json_is_read_or_refused(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("any") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    try:
        table = read_table(path)
    except AlignError:
        return
    assert table.num_rows == len(rows)
