"""Two processes over gloo give the losses of one with the same global batch, however they are started."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent

REWARD = """
def letters(prompts, completions, **columns):
    return [sum(letter in "aeiou" for letter in text) / 12 for text in completions]
"""


def recipe(folder: Path, llama: Path, stage: str, batch: int) -> Path:
    if stage == "sft":
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"Count to {n}."},
                    {"role": "assistant", "content": " ".join(map(str, range(1, n + 1)))},
                ]
            }
            for n in range(2, 18)
        ]
    elif stage == "ppo":
        rows = [{"prompt": f"Name number {n}" + "!" * (n % 3)} for n in range(2, 18)]
    else:
        rows = [
            {
                "prompt": f"Name number {n}.",
                "chosen": f"It is {n}.",
                "rejected": "I do not know" + "!" * n,
            }
            for n in range(2, 18)
        ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "stage": stage,
        "output_dir": str(folder / f"out-{batch}"),
        "model": {"model_name_or_path": str(llama)},
        "lora": {"lora_r": 4},
        "data": {"dataset_name": str(data), "max_length": 256},
        "trainer": {
            "per_device_train_batch_size": batch,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "train_sampling_strategy": "sequential",
            "gradient_checkpointing": False,
            "logging_steps": 1,
        },
    }
    if stage == "ppo":
        reward = folder / "reward.py"
        reward.write_text(REWARD)
        config |= {
            "scorer": {"reward_funcs": {f"{reward}:letters": 1.0}},
            "generation": {"max_new_tokens": 12, "num_generations": 2},
            "num_mini_batches": 2,
            "num_ppo_epochs": 2,
        }
        config["trainer"] |= {"learning_rate": 1e-3, "gradient_accumulation_steps": 2}
    path = folder / f"recipe-{batch}.yaml"
    path.write_text(json.dumps(config))
    return path


def start(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(
        command,
        cwd=CHECKOUT,
        env={**clean, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def losses(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line and "step" in line][:4]


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
    ("stage", "how"),
    [("sft", "flag"), ("sft", "accelerate"), ("reward", "flag"), ("dpo", "torchrun")],
)
def test_two_processes_give_the_losses_of_one(llama, tmp_path, stage, how):
    one = recipe(tmp_path, llama, stage, batch=4)
    two = recipe(tmp_path, llama, stage, batch=2)
    alone = start([sys.executable, "cli.py", stage, "--recipe", str(one)])
    assert alone.returncode == 0, alone.stderr
    command = [part.format(stage=stage) for part in STARTS[how]]
    more = [] if how == "flag" else ["--set", "launch.num_processes=2"]
    both = start([*command, "--recipe", str(two), *more])
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
