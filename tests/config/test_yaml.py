"""YAML as a person means it, with lines, and nothing that harms."""

import time
from contextlib import suppress
from itertools import pairwise

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from align.config.yaml import LOADER, MAX_BYTES, MAX_DEPTH, parse, parse_value, plain, read
from align.errors import AlignError

SCALARS = [
    ("1e-5", 1e-5),
    ("1E5", 1e5),
    ("2.0e-4", 2e-4),
    ("1e+3", 1e3),
    (".5", 0.5),
    ("1.", 1.0),
    ("-0.1", -0.1),
    ("+3", 3),
    ("-7", -7),
    ("0", 0),
    ("0x1F", 31),
    ("0o17", 15),
    ("010", "010"),
    ("08", "08"),
    ("1_000", "1_000"),
    ("12:30", "12:30"),
    ("1:2:3", "1:2:3"),
    ("2026-01-01", "2026-01-01"),
    ("2026-01-01 10:00:00", "2026-01-01 10:00:00"),
    ("no", "no"),
    ("No", "No"),
    ("yes", "yes"),
    ("on", "on"),
    ("off", "off"),
    ("y", "y"),
    ("n", "n"),
    ("true", True),
    ("True", True),
    ("FALSE", False),
    ("tRue", "tRue"),
    ("null", None),
    ("~", None),
    ("", None),
    ("none", "none"),
    ("None", "None"),
    ("nan", "nan"),
    (".inf", float("inf")),
    ("-.INF", float("-inf")),
    ("1.2.3", "1.2.3"),
    ("1e", "1e"),
    ("e5", "e5"),
    ("7e10f", "7e10f"),
    ("=", "="),
    ("<", "<"),
    ("'1e-5'", "1e-5"),
    ('"true"', "true"),
    ("!!str 10", "10"),
    ("[q_proj, 1, 1e-3]", ["q_proj", 1, 1e-3]),
    ("{a: no}", {"a": "no"}),
]


@pytest.mark.parametrize(("text", "value"), SCALARS, ids=[text or "empty" for text, _ in SCALARS])
@pytest.mark.parametrize("loader", [yaml.SafeLoader, LOADER])
def test_scalars_are_what_a_person_means(text, value, loader, monkeypatch):
    monkeypatch.setattr("align.config.yaml.LOADER", loader)
    found = parse(f"key: {text}\n", "r.yaml").data["key"]
    assert found == value
    assert type(found) is type(value)


def test_not_a_number_is_a_float():
    assert str(parse("a: .nan", "r.yaml").data["a"]) == "nan"


@pytest.mark.parametrize("key", ["no", "on", "1", "1e5", "true", "null", "12:30"])
def test_keys_are_text_as_written(key):
    assert parse(f"{key}: 1", "r.yaml").data == {key: 1}


def test_lines_and_texts_of_nested_keys():
    document = parse("a:\n  b: 7e10\n  c:\n    - x\n    - {d: 1.0}\n", "r.yaml")
    assert document.lines[("a",)] == 1
    assert document.lines[("a", "b")] == 2
    assert document.lines[("a", "c", 0)] == 4
    assert document.lines[("a", "c", 1, "d")] == 5
    assert document.texts[("a", "b")] == "7e10"
    assert document.texts[("a", "c", 1, "d")] == "1.0"


def test_equal_keys_are_a_problem_with_both_lines():
    document = parse("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\na: 2\n", "r.yaml")
    assert [(p.where, p.message) for p in document.problems] == [
        ("r.yaml:5", "`b.c` is given twice (first in line 3)"),
        ("r.yaml:6", "`a` is given twice (first in line 1)"),
    ]
    assert document.data == {"a": 1, "b": {"c": 1, "d": 2}}


def test_merge_keys_give_way_to_own_keys():
    text = "base: &b {x: 1, y: 2}\nmore: &m {y: 5, z: 6}\nboth:\n  <<: [*b, *m]\n  x: 9\n"
    assert parse(text, "r.yaml").data["both"] == {"x": 9, "y": 2, "z": 6}


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ("a: 1\nb: [1\nc: 2\n", 3, "expected"),
        ("a:\n\tb: 2\n", 2, "cannot start any token"),
        ("a: b: c\n", 1, "mapping values are not allowed"),
        ("a: 1\nb: *c\n", 2, "undefined alias"),
        ("[1, 2]\n", 1, "holds a list"),
        ("text\n", 1, "holds a single value"),
        ("a: 1\n---\nb: 1\n", 2, "one document"),
        ("x" * (MAX_BYTES + 1), None, "larger than"),
        ("a: " + "[" * (MAX_DEPTH + 1), 1, "nested deeper"),
        ("a: " + "[" * 200_000, 1, "nested deeper"),
        ("a: &a [*a]\n", 1, "undefined alias"),
        ("a: \x00", None, "not allowed"),
    ],
)
@pytest.mark.parametrize("loader", [yaml.SafeLoader, LOADER])
def test_broken_files_are_one_problem_with_a_line(text, line, part, loader, monkeypatch):
    monkeypatch.setattr("align.config.yaml.LOADER", loader)
    with pytest.raises(AlignError) as caught:
        parse(text, "r.yaml")
    (problem,) = caught.value.problems
    assert part in problem.message
    assert problem.where == (f"r.yaml:{line}" if line else "r.yaml")


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.system [ls]", "!mine x", "!!int x", "!!timestamp 2026-01-01"]
)
def test_tags_are_refused_and_the_value_left_out(text):
    document = parse(f"a: {text}\nb: 1\n", "r.yaml")
    assert document.data == {"b": 1}
    assert "tag" in document.problems[0].message


def test_an_alias_bomb_ends_at_once():
    names = "abcdefghi"
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for before, name in pairwise(names):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    started = time.perf_counter()
    with pytest.raises(AlignError, match="aliases"):
        parse("\n".join(lines), "r.yaml")
    assert time.perf_counter() - started < 5


def test_files_that_cannot_be_read(tmp_path):
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"a: 1\nb: \xff\xfe\n")
    for path, part in [
        (tmp_path, "is a folder"),
        (tmp_path / "none.yaml", "no such file"),
        (tmp_path / "a\0b", "cannot be read"),
        (binary, "not UTF-8"),
    ]:
        with pytest.raises(AlignError, match=part):
            read(path)


def test_a_byte_order_mark_and_an_empty_file_are_fine(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_bytes(b"\xef\xbb\xbfa: 1\r\n")
    assert read(file).data == {"a": 1}
    file.write_text("# nothing\n")
    assert read(file).data == {}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("[a, 1]", ["a", 1]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
        ("You are: # kind", "You are: # kind"),
        ("- a", "- a"),
        ("*a", "*a"),
        ("'1'", "1"),
        ("", None),
    ],
)
def test_overrides_are_scalars_or_literals(text, value):
    assert parse_value(text, "--set")[0] == value


@pytest.mark.parametrize("text", ["[1", "{a", "[1], 2", "{a: 1}\nb: 2", "'x"])
def test_broken_literals_are_problems(text):
    with pytest.raises(AlignError):
        parse_value(text, "--set")


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=200) | st.text(alphabet="a1:-[]{}&*!<#'\"| \n\t,?>%@`", max_size=60))
def test_any_text_parses_or_is_refused(text):
    with suppress(AlignError):
        assert all(isinstance(key, str) for key in parse(text, "r.yaml").data)


@given(st.integers() | st.floats(allow_nan=False) | st.booleans())
def test_numbers_survive_being_written(value):
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    text = text.replace("inf", ".inf")
    assert plain(text) == value
