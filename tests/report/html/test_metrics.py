"""metrics.jsonl of runs that were stopped, resumed, torn and full of words for numbers."""

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as some

from align.report.html.metrics import MOST_POINTS, read_metrics, thinned


def lines(tmp_path: Path, *rows: object) -> Path:
    file = tmp_path / "metrics.jsonl"
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    file.write_text(text)
    return file


def test_a_step_that_was_done_again_counts_once(tmp_path):
    first = [{"attempt": 1, "step": step, "loss": float(step)} for step in (1, 2, 3, 4)]
    again = [{"attempt": 2, "step": step, "loss": 10.0 + step} for step in (3, 5)]
    found = read_metrics(lines(tmp_path, *first, *again))
    assert found.series("loss") == [(1, 1), (2, 2), (3, 13), (5, 15)]


def test_what_is_no_number_is_kept_apart(tmp_path):
    file = lines(
        tmp_path,
        {"step": 1, "loss": 1.0, "note": "text", "flag": True},
        {"step": 2, "loss": "nan", "grad_norm": "inf"},
        '{"step": 3, "loss": NaN}',
        {"step": 4, "loss": 0.5},
        {"alarm": "kl", "reason": "far", "step": 4},
        {"part": 0, "prompts": 3},
        '{"step": 5, "lo',
        "[1, 2]",
    )
    found = read_metrics(file)
    assert found.series("loss") == [(1, 1.0), (4, 0.5)]
    assert found.broken == {"loss": 2, "grad_norm": 2}
    assert found.series("note") == found.series("flag") == []
    assert [alarm["alarm"] for alarm in found.alarms] == ["kl"]
    assert len(found.plain) == 1
    assert found.torn == 2


def test_no_file_is_empty(tmp_path):
    assert read_metrics(tmp_path / "none").steps == {}


@given(some.integers(0, 3000))
def test_thinned_curves_keep_their_end_and_their_mean(count):
    points = [(float(step), float(step % 7)) for step in range(count)]
    few = thinned(points)
    assert len(few) <= MOST_POINTS
    assert few[-1:] == points[-1:]
    assert [step for step, _ in few] == sorted({step for step, _ in few})
