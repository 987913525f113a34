"""Files of rows to Arrow tables: JSON, CSV, Parquet, Arrow. Bad rows are named by their number.

Files are read here, without the cache of `load_dataset`: that cache is keyed by date and size, and
serves old rows when a file changes and keeps both.
"""

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq

from align.data.exact import TOOLS, as_text, held_exactly
from align.errors import AlignError, Problem, fail
from align.resources import display

MOST_PROBLEMS = 10
"""Problems told at once."""

Row = dict[str, Any]


def read_table(file: Path, tools: str = TOOLS) -> pa.Table:
    """The rows of a file.

    Args:
        file: where they are.
        tools: column of functions, which JSON rows keep as text (see `align.data.exact`).

    Raises:
        AlignError: it cannot be read, a row is broken, a column mixes types, or there is no row.
    """
    readers: dict[str, Callable[[Path], pa.Table]] = {
        ".jsonl": partial(_json_lines, tools=tools),
        ".json": partial(_json, tools=tools),
        ".csv": _csv,
        ".parquet": _parquet,
        ".arrow": _arrow,
    }
    where = display(file)
    try:
        table = readers[file.suffix.lower()](file)
    except OSError as error:
        fail(f"cannot be read: {error.strerror or error}", where=where)
    except UnicodeDecodeError as error:
        fail(f"is not UTF-8 text ({error})", where=where, hint="save it as UTF-8")
    except pa.ArrowInvalid as error:
        kind = file.suffix.lower().removeprefix(".")
        fail(f"is no sound {kind} file: {str(error).splitlines()[0]}", where=where)
    if table.num_rows == 0:
        fail("holds no rows", where=where, hint="check what wrote it")
    return table


def _json_lines(file: Path, tools: str) -> pa.Table:
    with file.open(encoding="utf-8-sig") as handle:
        lines = (line for line in handle if line.strip())
        rows = _parsed(lines, display(file))
        return _table((_exact(row, tools) for row in rows), display(file))


def _exact(row: Row, tools: str) -> Row:
    """A row of JSON whose functions, calls and marks stay as they were written."""
    return {
        name: as_text(value) if name == tools else held_exactly(value)
        for name, value in row.items()
    }


def _parsed(lines: Iterable[str], where: str) -> Iterator[Row]:
    problems: list[Problem] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            problems.append(Problem(f"is not JSON: {error}", f"{where} row {number}"))
        else:
            if isinstance(row, dict):
                yield row
                continue
            problems.append(_no_object(row, f"{where} row {number}"))
        if len(problems) == MOST_PROBLEMS:
            break
    if problems:
        raise AlignError(*problems)


def _no_object(row: Any, where: str) -> Problem:
    return Problem(f"is {kind_of(row)} and not an object with columns", where)


def _json(file: Path, tools: str) -> pa.Table:
    text, where = file.read_text(encoding="utf-8-sig"), display(file)
    try:
        content = json.loads(text)
    except ValueError as error:
        if "Extra data" in str(error):  # one object a line under the wrong name
            return _json_lines(file, tools)
        fail(f"is not JSON: {error}", where=where)
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        rows = lists[0] if len(content) == 1 and lists else [content]
    else:
        rows = content if isinstance(content, list) else [content]
    problems = [
        _no_object(row, f"{where} row {number}")
        for number, row in enumerate(rows, 1)
        if not isinstance(row, dict)
    ]
    if problems:
        raise AlignError(*problems[:MOST_PROBLEMS])
    return _table((_exact(row, tools) for row in rows), where)


def _csv(file: Path) -> pa.Table:
    """All columns as text: a question that is a number stays what it is."""
    csv.field_size_limit(sys.maxsize)
    where, rows, problems = display(file), [], []
    with file.open(encoding="utf-8-sig", newline="") as handle:
        reader = csv.DictReader(handle, strict=True)
        try:
            _refuse_other_separator(reader.fieldnames or (), where)
            for number, row in enumerate(reader, 1):
                if None in row or None in row.values():
                    found = sum(value is not None for key, value in row.items() if key is not None)
                    found += len(row.get(None) or ())
                    expected = len(reader.fieldnames or ())
                    message = f"has {found} fields, and the header has {expected}"
                    problems.append(Problem(message, f"{where} row {number}"))
                rows.append(row)
        except csv.Error as error:
            problems.append(Problem(f"is not CSV: {error}", f"{where} row {len(rows) + 1}"))
    if problems:
        raise AlignError(*problems[:MOST_PROBLEMS])
    return _table(rows, where)


def _refuse_other_separator(header: Sequence[str], where: str) -> None:
    """One column whose name holds semicolons or tabs is a whole header."""
    for mark, word in ((";", "semicolons"), ("\t", "tabs")):
        if len(header) == 1 and mark in header[0]:
            hint = "save it with commas (in a spreadsheet: CSV, separator `,`), or as jsonl"
            fail(f"separates its columns by {word} and not by commas", where=where, hint=hint)


def _parquet(file: Path) -> pa.Table:
    return pq.read_table(file, memory_map=True)


def _arrow(file: Path) -> pa.Table:
    source = pa.memory_map(str(file))
    try:
        return ipc.open_file(source).read_all()
    except pa.ArrowInvalid:
        source.seek(0)
        return ipc.open_stream(source).read_all()


def _table(rows: Iterable[Row], where: str) -> pa.Table:
    """Rows as columns; a column that a row lacks is empty there."""
    columns: dict[str, list[Any]] = {}
    count = 0
    for row in rows:
        for name, value in row.items():
            column = columns.setdefault(name, [])
            column.extend([None] * (count - len(column)))
            column.append(value)
        count += 1
    arrays = {}
    for name, column in columns.items():
        column.extend([None] * (count - len(column)))
        arrays[name] = _array(name, column, where)
    return pa.table(arrays) if arrays else pa.table({})


def _array(name: str, values: list[Any], where: str) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError, TypeError, ValueError):
        pass
    row = _first_misfit(values)
    value = values[row]
    first = next((item for item in values[:row] if item is not None), None)
    message = f"column `{name}` holds {kind_of(value)}"
    if first is not None and kind_of(value) != kind_of(first):
        message += f", and {kind_of(first)} in the rows before"
    elif isinstance(value, str):
        message += " that is not valid Unicode"
    elif isinstance(value, int | float):
        message += " that is too large"
    else:
        message += " whose parts have mixed types, or other types than in the rows before"
    fail(message, where=f"{where} row {row + 1}", hint="give the column one type in all rows")


def _first_misfit(values: list[Any]) -> int:
    """Index of the first value that cannot be in one column with those before it."""
    low, high = 0, len(values)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            pa.array(values[:middle])
            low = middle
        except (pa.ArrowException, OverflowError, UnicodeEncodeError, TypeError, ValueError):
            high = middle
    return high - 1


def kind_of(value: Any) -> str:
    """What a value of a row is, in words."""
    if value is None:
        return "nothing"
    names = {str: "text", bool: "true or false", int: "a number", float: "a number"}
    names |= {list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
