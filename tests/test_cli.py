"""Commands end to end, short of training: what they print, where, and with which exit code."""

import json
import os
import re
from pathlib import Path

import pytest

from align import cli
from align.cli import main
from align.environment import ALLOW_CODE
from align.errors import AlignError, Problem
from align.options import ordered

RECIPE = """\
stage: sft
output_dir: runs/x
model: {model_name_or_path: org/base}
data: {dataset_name: org/rows}
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in cli.QUIET.items():
        monkeypatch.setenv(name, value)
    Path("r.yaml").write_text(RECIPE)


@pytest.fixture
def align(capsys):
    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(words)
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return call


@pytest.fixture
def started(monkeypatch):
    """The configs of stages that would have run."""
    found = []

    def run_stage(config, **options):
        found.append(config)
        return Path("runs/x")

    monkeypatch.setattr("align.runs.run_stage", run_stage)
    return found


# --- stages -----------------------------------------------------------------------------------


def test_a_stage_runs_with_recipe_flags_and_sets(align, started):
    code, _, _ = align(
        "sft",
        *("--recipe", "r.yaml", "--learning-rate", "1e-3", "--set", "lora.lora_r=4"),
        *("--packing", "--max_steps=7", "--model_name_or_path", "org/other"),
    )
    assert code == 0
    (config,) = started
    assert config.trainer.learning_rate == 1e-3
    assert config.trainer.max_steps == 7
    assert config.lora.lora_r == 4
    assert config.data.packing is True
    assert config.model.model_name_or_path == "org/other"


def test_flags_alone_are_a_recipe(align, started):
    words = ["--model-name-or-path", "org/b", "--dataset-name", "org/d", "--output-dir", "runs/y"]
    assert align("sft", *words)[0] == 0
    assert started[0].output_dir == "runs/y"


@pytest.mark.parametrize(
    ("words", "rate"),
    [
        (["--set", "learning_rate=1e-3", "--learning-rate", "2e-3"], 2e-3),
        (["--learning-rate", "2e-3", "--set", "learning_rate=1e-3"], 1e-3),
        (["--set", "learning_rate=1e-3", "--set", "trainer.learning_rate=3e-3"], 3e-3),
        (["--learning_rate=2e-3", "--set=learning_rate=1e-3", "--learning-rate=4e-3"], 4e-3),
    ],
)
def test_the_last_of_set_and_flags_wins(align, started, words, rate):
    assert align("sft", "-r", "r.yaml", *words)[0] == 0
    assert started[0].trainer.learning_rate == rate


def test_order_of_overrides():
    argv = ["sft", "--set", "a=1", "--no-packing", "--set=b=2", "--seed", "3"]
    given = {"data.packing": False, "trainer.seed": "3"}
    found = ordered(argv, ["a=1", "b=2"], given)
    assert [x if isinstance(x, str) else x.origin for x in found] == [
        "a=1",
        "--packing",
        "b=2",
        "--seed",
    ]


def test_dry_run_prints_the_resolved_recipe_and_writes_nothing(align, started):
    code, out, _ = align("sft", "--recipe", "r.yaml", "--seed", "5", "--dry-run")
    assert code == 0
    assert not started
    assert re.search(r"^  seed: 5$", out, re.M)
    Path("again.yaml").write_text(out)
    assert align("validate", "again.yaml")[0] == 0
    assert {path.name for path in Path().iterdir()} == {"r.yaml", "again.yaml"}


def test_nothing_to_run(align):
    code, out, err = align("sft")
    assert (code, out) == (2, "")
    assert "nothing to run" in err
    assert "--recipe RECIPE" in err


def test_options_lists_keys_by_section(align):
    code, out, _ = align("sft", "--options")
    assert code == 0
    for heading in ("model", "lora", "data", "trainer", "launch"):
        assert re.search(rf"^{heading}$", out, re.M)
    assert "  trainer.learning_rate: float > 0 (default 0.0002)\n" in out
    assert "  model.model_name_or_path: text (required)\n" in out


def test_options_takes_a_pattern(align):
    _, out, _ = align("sft", "--options", "WARM")
    assert "trainer.warmup_steps" in out
    assert "lora" not in out
    code, _, err = align("sft", "--options", "zzzz")
    assert code == 2
    assert "no key of `sft` has `zzzz`" in err


def test_a_bad_recipe_is_one_screen_and_exit_code_2(align, started):
    Path("bad.yaml").write_text(RECIPE + "learnin_rate: 1\nlora_r: 0\n")
    code, out, err = align("sft", "--recipe", "bad.yaml")
    assert (code, out) == (2, "")
    assert not started
    assert "2 problems" in err
    assert "bad.yaml:5: `learnin_rate` is no key of `sft` (value `1`)" in err
    assert "did you mean `trainer.learning_rate`?" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("flags", [(), ("--allow-code",), ("--allow_code",)])
def test_code_from_files_is_allowed_by_a_flag_of_this_command_alone(align, monkeypatch, flags):
    monkeypatch.setenv(ALLOW_CODE, "0")  # so that it is put back afterwards
    seen = []
    for name in ("align.runs.run_stage", "align.pipeline.run_pipeline"):
        monkeypatch.setattr(name, lambda *_, **__: seen.append(os.environ[ALLOW_CODE]))
    Path("f.py").write_text("def f(completions, **_): return [1.0] * len(completions)")
    Path("p.yaml").write_text(
        "stage: ppo\noutput_dir: runs/p\nmodel: {model_name_or_path: org/base}\n"
        "data: {dataset_name: org/rows}\nscorer: {reward_funcs: {'f.py:f': 1.0}}\n"
    )
    assert align("ppo", "--recipe", "p.yaml", *flags)[0] == 0
    assert seen == ["1" if flags else "0"]
    monkeypatch.setenv(ALLOW_CODE, "0")
    assert align("run", "tiny/pipeline", *flags)[0] == 0
    assert seen == ["1" if flags else "0"] * 2


def test_other_stages_run_no_code_from_files(align, started):
    assert align("sft", "--recipe", "r.yaml", "--allow-code")[0] == 2
    assert started == []


def test_many_problems_still_fit_a_screen(align):
    Path("bad.yaml").write_text(RECIPE + "".join(f"zzz{n}: 1\n" for n in range(90)))
    code, _, err = align("validate", "bad.yaml")
    assert code == 2
    assert len(err.splitlines()) < 50
    assert "90 problems" in err
    assert re.search(r"\.\.\. and \d+ more", err)


def test_text_from_files_cannot_steer_the_terminal(align):
    Path("bad.yaml").write_text(
        RECIPE + 'system_prompt: [1]\n"[/red]\\e[2J": "\\e]52;c;x\\a[bold]"\n'
    )
    code, _, err = align("validate", "bad.yaml")
    assert code == 2
    assert "\x1b[2J" not in err
    assert "\x1b]52" not in err
    assert "[/red]" in err
    assert "[bold]" in err


def test_eval_prints_results_as_json(align, monkeypatch):
    Path("e.yaml").write_text(
        "stage: eval\noutput_dir: o\nmodels: {a: org/a}\ndataset_name: org/d\njudge: exact\n"
    )

    def run_stage(config, *, origins, quiet):
        assert quiet
        assert origins["judge"] == "e.yaml:5"
        artifact = Path("o/artifact")
        artifact.mkdir(parents=True)
        (artifact / "results.json").write_text('{"rows": [1]}')
        return Path("o")

    monkeypatch.setattr("align.runs.run_stage", run_stage)
    code, out, _ = align("eval", "--recipe", "e.yaml", "--json")
    assert code == 0
    assert json.loads(out) == {"rows": [1]}


# --- recipes ----------------------------------------------------------------------------------


def test_validate_as_json(align):
    code, out, _ = align("validate", "r.yaml", "--json")
    assert code == 0
    assert json.loads(out) == {"ok": True, "kind": "sft", "problems": [], "pending": []}
    Path("bad.yaml").write_text(RECIPE + "lora_r: 0\n")
    code, out, err = align("validate", "bad.yaml", "--json")
    assert code == 2
    found = json.loads(out)
    assert found["ok"] is False
    (problem,) = found["problems"]
    assert (problem["file"], problem["line"], problem["key"]) == ("bad.yaml", 5, "lora_r")
    assert problem["value"] == 0
    assert "bad.yaml:5" in err


def test_validate_says_what_has_to_run_first(align):
    Path("r.yaml").write_text(RECIPE.replace("org/base", "runs/a/artifact"))
    code, out, _ = align("validate", "r.yaml")
    assert code == 0
    assert "r.yaml:3: `model.model_name_or_path` is not there yet" in out
    code, _, err = align("sft", "--recipe", "r.yaml")
    assert code == 2
    assert "is not there yet" in err


def test_show_gives_every_value_its_origin(align):
    code, out, _ = align("show", "r.yaml", "--set", "trainer.seed=7")
    assert code == 0
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert rows["trainer.seed"] == ["7", "--set"]
    assert rows["model.model_name_or_path"] == ["org/base", "r.yaml:3"]
    assert rows["lora.lora_r"] == ["16", "default"]
    _, out, _ = align("show", "r.yaml", "--changed", "--json")
    assert json.loads(out) == {
        "output_dir": {"value": "runs/x", "origin": "r.yaml:2"},
        "model.model_name_or_path": {"value": "org/base", "origin": "r.yaml:3"},
        "data.dataset_name": {"value": "org/rows", "origin": "r.yaml:4"},
    }


def test_show_a_stage_of_a_pipeline(align):
    _, out, _ = align("show", "tiny/pipeline", "--stage", "sft", "--json")
    found = json.loads(out)
    assert all(key.startswith("sft.") for key in found)
    assert found["sft.merge_adapter"]["value"] is True
    code, _, err = align("show", "tiny/pipeline", "--stage", "stf")
    assert code == 2
    assert "did you mean `sft`?" in err


def test_show_lists_judges(align):
    code, out, _ = align("show", "--judges")
    assert code == 0
    assert {"judges", "number", "tiny_world", "best_worst"} <= set(out.split())
    assert align("show")[0] == 2


def test_schema_of_stages_and_pipelines(align):
    assert json.loads(align("schema", "dpo")[1])["title"] == "align dpo recipe"
    assert json.loads(align("schema")[1])["title"] == "align pipeline"
    code, _, err = align("schema", "dpoo")
    assert code == 2
    assert "did you mean `dpo`?" in err


def test_recipes_are_listed_printed_and_copied(align):
    _, out, _ = align("recipes", "list")
    assert re.search(r"^tiny/pipeline +pipeline +\S", out, re.M)
    _, text, _ = align("recipes", "show", "tiny/pipeline")
    assert "stages:" in text
    code, out, _ = align("recipes", "copy", "tiny/pipeline", "mine.yaml")
    assert (code, out) == (0, "mine.yaml\n")
    assert Path("mine.yaml").read_text() == text
    assert align("recipes", "copy", "tiny/pipeline", "mine.yaml")[0] == 2


def test_inspect_wants_a_stage_and_its_inputs(align):
    code, _, err = align("inspect", "tiny/pipeline")
    assert code == 2
    assert "add --stage with one of sft, " in err
    code, _, err = align("inspect", "tiny/pipeline", "--stage", "reward")
    assert code == 2
    assert "`align run tiny/pipeline --until sft`" in err


# --- pipelines --------------------------------------------------------------------------------


def test_run_passes_its_choices_on(align, monkeypatch):
    found = {}

    def run_pipeline(loaded, *, until, force):
        found.update(chosen=loaded.chosen, until=until, force=list(force))
        return Path("x")

    monkeypatch.setattr("align.pipeline.run_pipeline", run_pipeline)
    words = ["--with", "dpo", "--until", "dpo", "--force", "rs", "--set", "sft.trainer.seed=1"]
    assert align("run", "tiny/pipeline", *words)[0] == 0
    assert "dpo" in found["chosen"]
    assert (found["until"], found["force"]) == ("dpo", ["rs"])
    assert align("run", "tiny/pipeline", "--with", "dpp")[0] == 2


def test_run_dry_says_how_the_stages_stand(align):
    code, out, _ = align("run", "tiny/pipeline", "--dry-run")
    assert code == 0
    assert re.search(r"sft +missing", out)
    assert re.search(r"dpo +off", out)
    assert [path.name for path in Path().iterdir()] == ["r.yaml"]


@pytest.mark.parametrize("flag", ["--until", "--force"])
def test_run_dry_checks_the_names_of_stages(align, flag):
    code, out, err = align("run", "tiny/pipeline", "--dry-run", flag, "rewrd")
    assert (code, out) == (2, "")
    assert f"{flag}: no stage that runs is called `rewrd`" in err
    assert "did you mean `reward`?" in err


def test_status_as_json_and_without_anything(align):
    _, out, _ = align("status", "tiny/pipeline", "--json")
    stages = json.loads(out)["stages"]
    assert stages[0]["name"] == "sft"
    assert stages[0]["state"] == "missing"
    code, _, err = align("status")
    assert code == 2
    assert "no pipeline has run below runs/" in err
    assert align("status", "r.yaml")[0] == 2


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("runs/tiny", "`align run tiny/pipeline` makes it"),
        ("runs/tiny/reward/", "`align run tiny/pipeline --until reward` makes it"),
        ("runs/gsm8k/sft", "`align sft --recipe gsm8k/sft` makes it"),
        ("runs/mine", "`align run PIPELINE`"),
    ],
)
def test_status_before_the_first_run_says_what_makes_it(align, place, words):
    code, out, err = align("status", place)
    assert (code, out) == (2, "")
    assert "there is no run yet" in err
    assert words in err
    assert "did you mean `tiny/pipeline`?" in align("status", "tiny/pipelin")[2]


# --- ends -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["sft", "--recip", "x"], ["sftt"], ["inspect", "r.yaml", "--rows", "0"], ["validate"]]
)
def test_usage_errors_are_exit_code_2(align, words):
    code, out, _ = align(*words)
    assert (code, out) == (2, "")


def test_version(align):
    code, out, _ = align("--version")
    assert code == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", out)


def test_an_error_keeps_its_own_exit_code(align, monkeypatch):
    class Stopped(AlignError):
        exit_code = 143

    def stop(config, **options):
        raise Stopped(Problem("stopped by SIGTERM"))

    monkeypatch.setattr("align.runs.run_stage", stop)
    code, _, err = align("sft", "--recipe", "r.yaml")
    assert code == 143
    assert "stopped by SIGTERM" in err


def test_ctrl_c_is_130(align, monkeypatch):
    def stop(config, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("align.runs.run_stage", stop)
    assert align("sft", "--recipe", "r.yaml")[0] == 130


def test_unexpected_errors_leave_a_log_and_exit_code_1(align, monkeypatch, tmp_path):
    def break_down(config, **options):
        raise RuntimeError("hf_abcdefghijklmnop is no [/b] secret\nsecond line")

    monkeypatch.setattr("align.runs.run_stage", break_down)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, out, err = align("sft", "--recipe", "r.yaml")
    assert (code, out) == (1, "")
    assert "unexpected error: RuntimeError: <secret> is no [/b] secret" in err
    assert "Traceback" not in err
    (log,) = tmp_path.glob("align-*.log")
    assert str(log) in err.replace("\n", "")
    assert "Traceback" in log.read_text()
    assert "hf_abc" not in log.read_text()
    monkeypatch.setenv("ALIGN_DEBUG", "1")
    with pytest.raises(RuntimeError):
        main(["sft", "--recipe", "r.yaml"])


def test_an_error_that_a_stage_logged_names_that_log(align, monkeypatch, tmp_path):
    def break_down(config, **options):
        error = RuntimeError("x")
        error.add_note("The traceback is in runs/x.partial/log.txt; the same command goes on.")
        raise error

    monkeypatch.setattr("align.runs.run_stage", break_down)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    _, _, err = align("sft", "--recipe", "r.yaml")
    assert "runs/x.partial/log.txt" in err
    assert not list(tmp_path.glob("align-*.log"))


def test_other_processes_say_one_line(align, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    Path("bad.yaml").write_text(RECIPE + "learnin_rate: 1\nlora_r: 0\n")
    code, _, err = align("sft", "--recipe", "bad.yaml")
    assert code == 2
    assert err.startswith("process 1: bad.yaml:5: ")
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "command", ["status", "show", "validate", "plan", "report", "merge", "push", "runs", "chat"]
)
@pytest.mark.parametrize("place", ["{}", "runs/{}", "{}/artifact"])
def test_names_that_no_file_can_have_are_a_mistake_to_mend(align, command, place):
    code, _, err = align(command, place.format("a" * 300))
    assert code == 2, err
    assert "unexpected" not in err


def test_denied_files_are_a_mistake_to_mend(monkeypatch, capsys):
    def denied(_words):
        raise PermissionError(13, "Permission denied", "/data/rows.jsonl")

    monkeypatch.setattr(cli, "build", denied)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["status", "runs"])
    assert stopped.value.code == 2
    assert "/data/rows.jsonl: permission denied" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "/data/x"), "/data/x: the disk is full"),
        (OSError(30, "Read-only file system", "/data/x"), "/data/x: is on a disk that may only"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full"),
    ],
)
def test_errors_of_the_disk_are_mistakes_to_mend(monkeypatch, capsys, error, said):
    def broken(_words):
        raise error

    monkeypatch.setattr(cli, "build", broken)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["status", "runs"])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_a_damaged_weights_file_is_a_mistake_to_mend(monkeypatch, capsys, tmp_path):
    from safetensors import safe_open

    (tmp_path / "model.safetensors").touch()

    def load(_words):
        safe_open(tmp_path / "model.safetensors", framework="np")

    monkeypatch.setattr(cli, "build", load)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["chat", "x"])
    assert stopped.value.code == 2
    assert "a .safetensors file is damaged" in capsys.readouterr().err


def test_what_is_neither_a_folder_nor_a_recipe_is_said_so(align):
    for command in ("status", "report"):
        code, _, err = align(command, "nowhere")
        assert code == 2
        assert "nowhere: is no folder and no recipe" in err


def test_a_report_of_a_recipe_without_a_folder_names_the_recipe(align):
    Path("empty.yaml").touch()
    code, _, err = align("report", "empty.yaml")
    assert code == 2
    assert "empty.yaml: says no `output_dir`" in err
