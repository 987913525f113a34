"""Two processes over gloo give the losses of one with the same global batch, however they are started."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent


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
def test_one_process_where_two_were_asked_for_is_an_error(llama, tmp_path):
    path = recipe(tmp_path, llama, "sft", batch=2)
    # accelerate's --cpu starts a single process whatever number it is given, and says nothing.
    silent = [*ACCELERATE, "--cpu", "--num_processes", "2", "cli.py", "sft"]
    done = start([*silent, "--recipe", str(path), "--set", "launch.num_processes=2"])
    assert done.returncode != 0
    assert "process" in done.stderr
    assert not (tmp_path / "out-2").exists()
