"""Progress: a live bar in a terminal, a line per tenth elsewhere, nothing where unwanted."""

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align.report import progress as module
from align.report.progress import Meter, duration, memory, progress, short, size

ROOT = Path(__file__).parents[2]


def test_plain_lines_come_once_per_tenth(capsys) -> None:
    with progress(200, "sample") as meter:
        for _ in range(200):
            meter.advance(tokens=meter.done * 7, score=0.123456)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("sample: 20/200 prompts, score 0.1235, ")
    assert "tokens/s" in lines[0]
    assert lines[-1].startswith("sample: 200/200 prompts")
    assert "in all" in lines[-1]
    assert all("\x1b" not in line for line in lines)


def test_a_slow_stage_still_gives_a_sign(capsys, monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    meter = Meter(10_000, "sft")
    for _ in range(5):
        now[0] += 61
        meter.advance()
    assert len(capsys.readouterr().err.splitlines()) == 5


def test_the_time_left_counts_from_where_an_attempt_began(capsys, monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    meter = Meter(100, "sft", done=80)
    now[0] += 30
    meter.update(90)
    assert ", 0:30 left" in f", {meter.text()}"


def test_quiet_and_other_ranks_print_nothing(capsys, monkeypatch) -> None:
    with progress(10, "sft", quiet=True) as meter:
        meter.advance(10)
    monkeypatch.setenv("RANK", "1")
    with progress(10, "sft") as meter:
        meter.advance(10)
    assert capsys.readouterr().err == ""


def test_an_empty_stage_and_a_stop_before_the_end(capsys) -> None:
    with progress(0, "sample") as meter:
        meter.update(0)
    with progress(10, "sft") as meter:
        meter.advance(3)
        meter.advance(0)
    assert "sft: 3/10 prompts" in capsys.readouterr().err


def test_numbers_are_short() -> None:
    assert [short(n) for n in (870, 12_345, 999_960, 4.1e6)] == ["870", "12.3k", "1.0M", "4.1M"]
    assert [duration(s) for s in (7, 750, 10921)] == ["0:07", "12:30", "3:02:01"]
    assert [size(n) for n in (870, 12_345, 4.1e9)] == ["870 B", "12.3 kB", "4.1 GB"]
    assert memory().endswith("B")


SCRIPT = """
import time
from align.report.progress import progress
with progress(20, "sft", unit="steps") as meter:
    for step in range(20):
        meter.advance(tokens=step * 100, loss=1 / (step + 1))
        time.sleep(0.02)
"""


def in_a_terminal(**variables: str) -> str:
    """What the script writes to a pseudo terminal of 100 columns."""
    main, other = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdin=other,
        stdout=other,
        stderr=other,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100", "TERM": "xterm"} | variables,
    )
    os.close(other)
    said, deadline = b"", time.monotonic() + 30
    while time.monotonic() < deadline:
        ready, _, _ = select.select([main], [], [], 0.5)
        try:
            chunk = os.read(main, 65536) if ready else b""
        except OSError:
            break
        said += chunk
        if not chunk and child.poll() is not None:
            break
    assert child.wait(timeout=10) == 0
    os.close(main)
    return said.decode()


def test_a_terminal_gets_a_live_bar_and_one_line_at_the_end() -> None:
    said = in_a_terminal()
    assert "\x1b[" in said
    assert "━" in said
    assert said.splitlines()[-1].count("sft: 20/20 steps, loss 0.05") == 1


@pytest.mark.parametrize("variables", [{"TERM": "dumb"}])
def test_a_dumb_terminal_gets_plain_lines(variables: dict[str, str]) -> None:
    said = in_a_terminal(**variables)
    assert "\x1b" not in said
    assert said.count("sft: ") == 10
