"""The light floor: no heavy library, short help, quick answers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from align.stages import STAGES

CHECKOUT = Path(__file__).parent.parent
HEAVY = (
    *("torch", "transformers", "trl", "datasets", "accelerate", "peft", "bitsandbytes"),
    *("numpy", "pandas", "pyarrow", "huggingface_hub", "tokenizers", "safetensors", "jinja2"),
)

PROBE = """
import json, sys
from align.cli import main
try:
    main({argv!r})
except SystemExit as end:
    code = end.code
heavy = [name for name in {heavy!r} if name in sys.modules]
print(json.dumps([code, heavy, "pydantic.main" in sys.modules]), file=sys.stderr)
"""


def probe(folder: Path, *argv: str) -> tuple[str, int, list[str], bool]:
    """Standard output, exit code, heavy modules, and whether pydantic built anything."""
    code = PROBE.format(argv=list(argv), heavy=HEAVY)
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "COLUMNS": "80", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    last = done.stderr.strip().splitlines()[-1]
    exit_code, heavy, pydantic = json.loads(last)
    return done.stdout, exit_code or 0, heavy, pydantic


HELP = [
    [],
    *([kind] for kind in STAGES),
    *(
        [name]
        for name in (
            "run",
            "status",
            "runs",
            "report",
            "chat",
            "compare",
            "merge",
            "export",
            "push",
            "show",
            "validate",
            "inspect",
            "plan",
            "schema",
        )
    ),
    ["recipes"],
    *(["recipes", name] for name in ("list", "show", "copy", "convert")),
]


@pytest.mark.parametrize("words", HELP, ids=[" ".join(words) or "align" for words in HELP])
def test_help_is_short_and_light(words, tmp_path):
    out, code, heavy, pydantic = probe(tmp_path, *words, "--help")
    assert code == 0
    assert heavy == []
    assert not pydantic, "help has to answer before pydantic is imported"
    lines = out.rstrip().splitlines()
    assert 5 < len(lines) <= 60
    assert max(map(len, lines)) <= 80


LIGHT = [
    ["--version"],
    ["recipes", "list"],
    ["recipes", "show", "tiny/pipeline"],
    ["recipes", "copy", "tiny/pipeline"],
    ["validate", "tiny/pipeline"],
    ["validate", "llama3-8b/sft", "--json"],
    ["schema"],
    ["schema", "sft"],
    ["show", "tiny/pipeline"],
    ["show", "--judges"],
    ["status", "tiny/pipeline"],
    ["run", "tiny/pipeline", "--dry-run"],
    ["plan", "llama3-8b/pipeline"],
    ["plan", "tiny/pipeline", "--gpu", "t4", "--json"],
    ["sft", "--options"],
    ["eval", "--options", "temp"],
    ["sft", "--recipe", "llama3-8b/sft", "--dry-run"],
]


@pytest.mark.parametrize("words", LIGHT, ids=[" ".join(words) for words in LIGHT])
def test_light_commands_import_nothing_heavy(words, tmp_path):
    out, code, heavy, _ = probe(tmp_path, *words)
    assert code == 0
    assert heavy == []
    assert out.strip()


FLAT = """\
model_name_or_path: org/base
dataset_name: org/rows
torch_dtype: bfloat16
max_seq_length: 99
output_dir: runs/x
"""


@pytest.mark.parametrize(
    "words",
    [
        ["recipes", "convert", "flat.yaml", "--output", "ours.yaml"],
        ["validate", "flat.yaml"],
        ["sft", "--recipe", "flat.yaml", "--dry-run"],
    ],
    ids=["convert", "validate", "dry-run"],
)
def test_recipes_of_other_tools_are_read_without_heavy_libraries(words, tmp_path):
    (tmp_path / "flat.yaml").write_text(FLAT)
    out, code, heavy, _ = probe(tmp_path, *words)
    assert code == 0
    assert heavy == []
    assert out.strip()


def test_stage_modules_import_nothing_heavy(tmp_path):
    modules = [place.partition(":")[0] for place in STAGES.values()]
    code = f"""
import importlib, json, sys
for name in {modules!r} + ["align.pipeline", "align.runs", "align.launch", "align.status", "align.plan.report"]:
    importlib.import_module(name)
print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == []


def test_an_answer_without_colour_does_not_wait_for_rich(tmp_path):
    code = (
        "import sys; from align.report.terminal import sanitise; "
        "assert sanitise('a\\x1b') == 'a\\\\x1b'; sys.exit('rich.console' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    assert done.returncode == 0
