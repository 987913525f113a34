"""`align runs`: every run below a folder, finished, damaged, unfinished or set aside."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from test_floors import HEAVY

from align.cli import main
from align.lineage import digest_of
from align.locks import locked

CHECKOUT = Path(__file__).parent.parent


def write_run(folder: Path, *, done: bool = True, size: int = 3, **notes) -> Path:
    (folder / "artifact").mkdir(parents=True)
    (folder / "artifact" / "pairs.jsonl").write_text("abc")
    lineage = {"stage": "sample", "name": "best", "fingerprint": digest_of({}), "parts": {}}
    if done:
        lineage["outputs"] = {"files": {"pairs.jsonl": {"size": size}}}
    (folder / "lineage.json").write_text(json.dumps(lineage))
    (folder / "summary.json").write_text(json.dumps({"seconds": 61, **notes}))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    write_run(root / "a" / "best", score=0.5)
    write_run(root / "a" / "cut", size=4)
    step = write_run(root / "b.partial", done=False)
    (step / "metrics.jsonl").write_text('{"step": 7}\n')
    write_run(root / "b.partial-0123abcd", done=False)
    write_run(root / "a" / ".old" / "best-1")
    (root / "c").mkdir()
    (root / "c" / "lineage.json").write_text("{")
    return root


def listed(runs: Path, capsys) -> dict[str, dict]:
    with pytest.raises(SystemExit):
        main(["runs", str(runs), "--json"])
    return {run["name"]: run for run in json.loads(capsys.readouterr().out)["runs"]}


def test_every_run_is_listed_with_its_state(runs, capsys):
    found = listed(runs, capsys)
    assert {name: run["state"] for name, run in found.items()} == {
        "a/best": "complete",
        "a/cut": "damaged",
        "b.partial": "partial",
        "b.partial-0123abcd": "partial",
        "c": "damaged",
    }
    assert found["b.partial"]["step"] == 7
    assert found["b.partial-0123abcd"]["reasons"] == ["set aside for another recipe"]
    assert found["a/best"]["summary"]["score"] == 0.5


def test_the_table_is_for_eyes_and_needs_no_model_library(runs):
    code = (
        "import sys\nfrom align.cli import main\ntry:\n    main()\nfinally:\n"
        f"    assert not [name for name in {HEAVY!r} if name in sys.modules]"
    )
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "COLUMNS": "100", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, "runs", str(runs)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if "a/best" in line)
    assert "complete" in line
    assert "1:01" in line
    assert line.rstrip().endswith("score 0.5")


def test_a_folder_without_runs_says_so(tmp_path, capsys):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SystemExit) as end:
            main(["runs", str(place)])
        assert end.value.code == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_run_that_is_being_written_says_so(runs, capsys):
    with locked(runs / "b"):
        found = listed(runs, capsys)
        assert found["b.partial"]["process"] == os.getpid()
        assert found["b.partial"]["state"] == "partial"
        assert found["b.partial-0123abcd"]["process"] is None
        with pytest.raises(SystemExit):
            main(["runs", str(runs)])
        assert "running (step 7)" in capsys.readouterr().out
    assert listed(runs, capsys)["b.partial"]["process"] is None


def test_the_lock_file_of_a_killed_process_is_no_process(runs, capsys):
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    left = {"pid": child.pid, "host": platform.node()}
    for content in (json.dumps(left), "", "[]", json.dumps({"pid": "x", "host": platform.node()})):
        (runs / ".b.lock").write_text(content)
        assert listed(runs, capsys)["b.partial"]["process"] is None
