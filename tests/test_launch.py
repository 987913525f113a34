"""The world a stage runs in is the one that was asked for, or it stops."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align.config.load import load_stage
from align.config.sections import LaunchSection
from align.errors import AlignError
from align.launch import (
    ACCELERATE_MARK,
    _code_of_all,
    adopt_slurm,
    check_world,
    first_host,
    launched_world,
    needs_launch,
)
from align.resources import shipped

CHECKOUT = Path(__file__).parent.parent
ONE, TWO = LaunchSection(), LaunchSection(num_processes=2)


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "ACCELERATE_", "TORCHELASTIC_", "FSDP_")):
            monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def set_all(monkeypatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


# --- what the environment says ----------------------------------------------------------------


def test_nobody_launched_this():
    assert launched_world() is None
    assert not needs_launch(ONE)
    assert needs_launch(TWO)
    assert needs_launch(LaunchSection(accelerate="ddp"))
    check_world(ONE)
    check_world(LaunchSection(num_processes=1))


def test_torchrun_is_seen(monkeypatch):
    set_all(monkeypatch, RANK="1", WORLD_SIZE="4", LOCAL_RANK="1")
    assert launched_world() == 4
    assert not needs_launch(LaunchSection(num_processes=4))


def test_accelerate_with_one_process_is_seen(monkeypatch):
    set_all(monkeypatch, **{ACCELERATE_MARK: "False"})
    assert launched_world() == 1
    assert not needs_launch(TWO)
    check_world(ONE)


@pytest.mark.parametrize(
    ("launch", "variables", "words"),
    [
        (TWO, {ACCELERATE_MARK: "False"}, "2 processes were asked for, and 1 run"),
        (TWO, {"RANK": "0", "WORLD_SIZE": "3"}, "2 processes were asked for, and 3 run"),
        (
            LaunchSection(num_processes=1),
            {"RANK": "0", "WORLD_SIZE": "2"},
            "1 processes were asked for, and 2 run",
        ),
        (
            ONE,
            {ACCELERATE_MARK: "False", "MASTER_ADDR": "127.0.0.1"},
            "several processes and started one",
        ),
        (
            LaunchSection(accelerate="fsdp2"),
            {"RANK": "0", "WORLD_SIZE": "1"},
            "asks for FSDP, and the launcher did not turn it on",
        ),
    ],
)
def test_another_world_than_asked_for_is_refused(monkeypatch, launch, variables, words):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    set_all(monkeypatch, **variables)
    with pytest.raises(AlignError, match=words) as caught:
        check_world(launch)
    assert caught.value.exit_code == 2


def test_a_number_in_an_accelerate_file_is_asked_for_too(tmp_path, monkeypatch):
    file = tmp_path / "a.yaml"
    file.write_text("distributed_type: MULTI_GPU\nnum_processes: 4\n")
    set_all(monkeypatch, RANK="0", WORLD_SIZE="2")
    with pytest.raises(AlignError, match="4 processes were asked for, and 2 run"):
        check_world(LaunchSection(accelerate=str(file)))


def test_slurm_steps_become_ranks():
    environment = {
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "gpu[07-08]",
        "SLURM_JOB_ID": "41234",
    }
    adopt_slurm(environment)
    assert environment["RANK"] == "3"
    assert environment["LOCAL_RANK"] == "1"
    assert environment["WORLD_SIZE"] == "4"
    assert environment["MASTER_ADDR"] == "gpu07"
    assert 20000 <= int(environment["MASTER_PORT"]) < 40000


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # the batch script
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1", "RANK": "5"},  # torchrun under srun
    ],
)
def test_other_slurm_environments_are_left_alone(environment):
    before = dict(environment)
    adopt_slurm(environment)
    assert environment == before


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-4]", "n1"),
        ("gpu[03-07,9]-ib,other", "gpu03-ib"),
        ("a[001,005]", "a001"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_node_list(nodes, host):
    assert first_host(nodes) == host


def test_only_explicit_numbers_are_asked_for(tmp_path, monkeypatch):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("stage: sft\noutput_dir: o\nmodel_name_or_path: org/b\ndataset_name: org/d\n")
    set_all(monkeypatch, RANK="0", WORLD_SIZE="1")
    check_world(load_stage(recipe).config.launch)
    with pytest.raises(AlignError, match="2 processes were asked for"):
        check_world(load_stage(recipe, ["num_processes=2"]).config.launch)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_shipped_accelerate_configs_are_accelerates_own(name):
    from accelerate.commands.config.config_args import ClusterConfig

    loaded = ClusterConfig.from_yaml_file(shipped("recipes") / "accelerate" / f"{name}.yaml")
    assert loaded.main_process_port == 0
    assert loaded.num_processes == -1  # launch.num_processes decides


# --- real processes ---------------------------------------------------------------------------

WORLD = """
import os, sys
from align.config.sections import LaunchSection
from align.launch import check_world
from align.answers import answer
from align.errors import AlignError
try:
    check_world(LaunchSection(**{launch!r}))
except AlignError as error:
    sys.exit(answer(error))
from accelerate import PartialState
from accelerate.utils import gather_object
state = PartialState()
ranks = gather_object([state.process_index])
if state.process_index == 0:
    print("WORLD", state.num_processes, ranks, state.backend, flush=True)
"""


def start(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def script(tmp_path):
    def write(**launch: object) -> str:
        file = tmp_path / "world.py"
        file.write_text(WORLD.format(launch=launch))
        return str(file)

    return write


DDP = str(shipped("recipes") / "accelerate" / "ddp.yaml")
ACCELERATE = ["accelerate.commands.launch", "--mixed_precision", "no", "--dynamo_backend", "no"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--nproc-per-node", "2"],
        [*ACCELERATE, "--num_machines", "1", "--multi_gpu", "--num_processes", "2"],
        ["align.launch", "--config_file", DDP, "--num_processes", "2"],
    ],
    ids=["torchrun", "accelerate", "align"],
)
def test_two_processes_see_each_other_without_gpus(launcher, script, tmp_path):
    done = start([*launcher, script(num_processes=2)], tmp_path)
    assert "WORLD 2 [0, 1] gloo" in done.stdout, done.stderr
    assert done.returncode == 0


@pytest.mark.slow
def test_accelerate_on_cpu_starts_one_process_and_is_refused(script, tmp_path):
    launcher = [*ACCELERATE, "--cpu", "--num_processes", "2"]
    done = start([*launcher, script()], tmp_path)
    assert "was asked for several processes and started one" in done.stderr
    assert "WORLD" not in done.stdout
    assert done.returncode != 0
    done = start([*ACCELERATE, "--cpu", "--num_processes", "1", script()], tmp_path)
    assert "WORLD 1 [0]" in done.stdout, done.stderr


RECIPE = "stage: sft\noutput_dir: o\nmodel_name_or_path: {base}\ndataset_name: rows.jsonl\n"


@pytest.fixture
def bad_rows(tmp_path):
    """A recipe whose rows end on a user's turn: the stage refuses it after it was launched."""
    base = shipped("recipes") / "tiny" / "base"
    (tmp_path / "r.yaml").write_text(RECIPE.format(base=base))
    row = '{"messages": [{"role": "user", "content": "hi"}]}\n'
    (tmp_path / "rows.jsonl").write_text(row)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_errors_of_launched_processes_keep_their_exit_code(bad_rows, way):
    words = ["--num-processes", "2", "--accelerate", way]
    done = start(["align", "sft", "--recipe", "r.yaml", *words], bad_rows)
    assert done.returncode == 2, done.stderr
    assert "rows.jsonl row 1" in done.stderr
    assert "Traceback" not in done.stderr
    assert "ChildFailedError" not in done.stderr
    assert len(done.stderr.splitlines()) < 10
    assert sorted(path.name for path in bad_rows.iterdir()) == ["r.yaml", "rows.jsonl"]


@pytest.mark.slow
def test_what_cannot_be_launched_is_refused(bad_rows):
    import torch

    if torch.accelerator.is_available():
        pytest.skip("there is a GPU")
    done = start(["align", "sft", "--recipe", "r.yaml", "--accelerate", "ddp"], bad_rows)
    assert done.returncode == 2
    assert "it is not said how many processes to start" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_signal_reaches_every_process_once(tmp_path):
    (tmp_path / "sleeper.py").write_text(
        "import os, signal, sys, time\n"
        "count = 0\n"
        "def note(*_):\n"
        "    global count\n"
        "    count += 1\n"
        "signal.signal(signal.SIGINT, note)\n"
        "open(f'ready{os.environ[\"RANK\"]}', 'w').close()\n"
        "until = time.time() + 40\n"
        "while not count and time.time() < until:\n"
        "    time.sleep(0.1)\n"
        "time.sleep(1)\n"
        "print('SIGNALS', count, flush=True)\n"
        "sys.exit(128 + signal.SIGINT)\n"
    )
    code = (
        "import sys, subprocess\n"
        "import align.launch as launch\n"
        "from align.config.sections import LaunchSection\n"
        "popen = subprocess.Popen\n"
        "def start(command, **options):\n"
        "    at = command.index('--module')\n"
        "    return popen([*command[:at], 'sleeper.py'], **options)\n"
        "launch.subprocess.Popen = start\n"
        "sys.exit(launch.relaunch([], LaunchSection(num_processes=2)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    for _ in range(600):
        if (tmp_path / "ready0").exists() and (tmp_path / "ready1").exists():
            break
        time.sleep(0.1)
    process.send_signal(2)
    out, _ = process.communicate(timeout=60)
    assert out.count("SIGNALS 1") == 2
    assert process.returncode == 130


@pytest.mark.parametrize(
    ("codes", "expected"),
    [([2], 2), ([-15, 2], 2), ([143, 2], 2), ([1, -9], 1), ([-15, -15], 143), ([-11], 139)],
)
def test_of_processes_that_fail_together_the_one_that_failed_by_itself_counts(codes, expected):
    assert _code_of_all(codes) == expected
