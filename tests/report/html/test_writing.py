"""When the report is written, and when it is not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from report_pages import losses

from align.errors import AlignError
from align.report.html import page
from align.report.html.writing import write_report

CHECKOUT = Path(__file__).parents[3]


def test_an_unchanged_run_is_not_drawn_again(
    complete: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_report(complete)
    assert file == complete / "report.html"
    before = file.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(page, "render", lambda *_: pytest.fail("drawn again"))
        assert write_report(complete) == file
    assert file.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "name", ["summary.json", "lineage.json", "metrics.jsonl", "environment.json"]
)
def test_a_changed_run_is_drawn_again(complete: Path, name: str) -> None:
    first = write_report(complete).read_text()
    changed = complete / "ppo" / name
    changed.write_text(
        changed.read_text() + ("\n" if name != "metrics.jsonl" else str(losses(1)[0]))
    )
    assert write_report(complete).read_text() != first


def test_a_report_can_be_written_elsewhere_and_again(complete: Path, tmp_path: Path) -> None:
    file = write_report(complete, tmp_path / "mine.html")
    assert file.read_text().startswith("<!doctype html>")
    assert not (complete / "report.html").exists()
    (complete / "sft" / "summary.json").write_text('{"seconds": 3}')
    assert write_report(complete, file) == file


@pytest.mark.parametrize(
    "content", ["my own page", "<!doctype html><title>mine</title>", "\x00\xff"]
)
def test_what_is_no_report_of_ours_is_never_overwritten(complete: Path, content: str) -> None:
    file = complete / "report.html"
    file.write_text(content)
    with pytest.raises(AlignError, match="no report of align"):
        write_report(complete)
    assert file.read_text() == content


def test_places_that_cannot_be_written(complete: Path, tmp_path: Path) -> None:
    with pytest.raises(AlignError, match="cannot be written"):
        write_report(complete, tmp_path / "no" / "such" / "folder.html")
    with pytest.raises(AlignError, match="is a folder"):
        write_report(complete, tmp_path)
    with pytest.raises(AlignError, match="holds no run of align"):
        write_report(tmp_path)


def test_the_run_is_only_read(complete: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in complete.rglob("*")}
    write_report(complete, tmp_path / "r.html")
    assert {path: path.stat().st_mtime_ns for path in complete.rglob("*")} == before


def test_the_command_prints_the_path_and_loads_no_model_library(complete: Path) -> None:
    code = (
        "import sys; from align.cli import main\n"
        "try: main(['report', sys.argv[1]])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'accelerate', 'pandas'}\n"
        "print(sorted(heavy & set(sys.modules)), 'jinja2' in sys.modules)"
    )

    def run() -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", code, str(complete)],
            cwd=complete.parent,
            env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.split("\n")[:2]

    assert run() == ["demo/report.html", "[] True"]
    assert run() == ["demo/report.html", "[] False"], "an unchanged report needs no template engine"
