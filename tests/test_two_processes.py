"""Two processes over gloo give the losses of one with the same global batch, however they are started."""

import json
import sys

import pytest
from launched import REWARD, losses, recipe, start

ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
STARTS = {
    "flag": [sys.executable, "cli.py", "{stage}", "--num-processes", "2"],
    "accelerate": [*ACCELERATE, "--multi_gpu", "--num_processes", "2", "cli.py", "{stage}"],
    "torchrun": [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "cli.py",
        "{stage}",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "how", "given"),
    [
        ("sft", "flag", []),
        ("sft", "accelerate", []),
        ("reward", "flag", []),
        ("dpo", "torchrun", []),
        ("dpo", "flag", ["--set", "precompute_ref_log_probs=true"]),
    ],
)
def test_two_processes_give_the_losses_of_one(llama, tmp_path, stage, how, given):
    one = recipe(tmp_path, llama, stage, batch=4)
    two = recipe(tmp_path, llama, stage, batch=2)
    alone = start([sys.executable, "cli.py", stage, "--recipe", str(one), *given])
    assert alone.returncode == 0, alone.stderr
    command = [part.format(stage=stage) for part in STARTS[how]]
    more = [] if how == "flag" else ["--set", "launch.num_processes=2"]
    both = start([*command, "--recipe", str(two), *more, *given])
    assert both.returncode == 0, both.stderr
    expected, found = losses(tmp_path / "out-4"), losses(tmp_path / "out-2")
    assert len(expected) == 4
    assert found == pytest.approx(expected, abs=1e-5)
    assert expected[0] != pytest.approx(expected[-1], abs=1e-3)


@pytest.mark.slow
def test_two_processes_make_the_rollouts_and_updates_of_one(llama, tmp_path):
    """PPO: drawn, scored and learned from in two shares, with one advantage mean and one clip."""
    allowed = {"ALIGN_ALLOW_CODE": "1"}
    one = recipe(tmp_path, llama, "ppo", batch=4)
    two = recipe(tmp_path, llama, "ppo", batch=2)
    command = [sys.executable, "cli.py", "ppo", "--recipe"]
    alone = start([*command, str(one)], **allowed)
    assert alone.returncode == 0, alone.stderr
    both = start([*command, str(two), "--num-processes", "2"], **allowed)
    assert both.returncode == 0, both.stderr
    found = []
    for batch in (4, 2):
        path = tmp_path / f"out-{batch}" / "metrics.jsonl"
        found.append([json.loads(line) for line in path.read_text().splitlines()])
    steps = [[line for line in lines if "loss" in line and "step" in line] for lines in found]
    assert len(steps[0]) == 4
    assert steps[0][0]["objective/scores"] > 0
    for key in ("loss", "loss/policy_avg", "loss/value_avg", "grad_norm/policy", "val/ratio_max"):
        values = [[line[key] for line in lines] for lines in steps]
        assert values[1] == pytest.approx(values[0], abs=1e-5), key
    samples = [(tmp_path / f"out-{batch}" / "samples.jsonl").read_text() for batch in (4, 2)]
    drawn = [[json.loads(line)["completion"] for line in one.splitlines()] for one in samples]
    assert drawn[0] == drawn[1]


@pytest.mark.slow
def test_a_reward_function_that_fails_in_one_process_ends_both(llama, tmp_path):
    """The other one would wait for its scores until a timeout; `--allow-code` reaches both."""
    path = recipe(tmp_path, llama, "ppo", batch=2)
    failing = "\n    import os\n    if os.environ['RANK'] == '1':\n        raise OSError('no connection')\n"
    head, body = REWARD.split(":\n", 1)
    (tmp_path / "reward.py").write_text(f"{head}:{failing}{body}")
    command = [sys.executable, "cli.py", "ppo", "--allow-code", "--num-processes", "2", "--recipe"]
    done = start([*command, str(path)])
    assert done.returncode == 2, done.stderr
    assert "raised OSError: no connection" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_one_process_where_two_were_asked_for_is_an_error(llama, tmp_path):
    path = recipe(tmp_path, llama, "sft", batch=2)
    # accelerate's --cpu starts a single process whatever number it is given, and says nothing.
    silent = [*ACCELERATE, "--cpu", "--num_processes", "2", "cli.py", "sft"]
    done = start([*silent, "--recipe", str(path), "--set", "launch.num_processes=2"])
    assert done.returncode != 0
    assert "process" in done.stderr
    assert not (tmp_path / "out-2").exists()
