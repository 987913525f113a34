"""FSDP2 and ZeRO-3: two processes that hold half of every weight each train, save and resume as one that holds all."""

import json
import math
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from subprocess import DEVNULL, Popen

import psutil
import pytest
import yaml
from launched import CHECKOUT, losses, recipe, start
from safetensors.torch import load_file

CLI = [sys.executable, "cli.py"]

ZERO3 = {
    "zero_optimization": {
        "stage": 3,
        # Of a tiny model every weight would stay whole otherwise.
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "bf16": {"enabled": "auto"},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "gradient_clipping": "auto",
}


WAYS = ["fsdp2", "zero3"] if find_spec("deepspeed") else ["fsdp2"]


def sharded(folder: Path, way: str) -> list[str]:
    if way == "zero3":
        settings = folder / "deepspeed.json"
        settings.write_text(json.dumps(ZERO3))
        shipped = yaml.safe_load((CHECKOUT / "recipes/accelerate/zero3.yaml").read_text())
        del shipped["mixed_precision"]  # accelerate reads it from that file
        shipped["deepspeed_config"] = {
            "deepspeed_config_file": str(settings),
            "zero3_init_flag": True,
        }
        path = folder / "zero3.yaml"
        path.write_text(yaml.safe_dump(shipped))
        way = str(path)
    return ["--num-processes", "2", "--accelerate", way]


def settings(**values: object) -> list[str]:
    return [
        word
        for key, value in values.items()
        for word in ("--set", f"{key.replace('__', '.')}={json.dumps(value)}")
    ]


def weights(run: Path):
    (file,) = (run / "artifact").glob("*.safetensors")
    return load_file(file)


def assert_close(run: Path, other: Path) -> None:
    found, wanted = weights(run), weights(other)
    assert found.keys() == wanted.keys()
    # Adam divides by the size of a gradient: a gradient of zero but for rounding moves a weight by a learning rate.
    apart = {name: float((found[name] - wanted[name]).abs().max()) for name in wanted}
    assert max(apart.values()) < 1e-3, apart


FULL = {"lora__use_peft": False, "trainer__learning_rate": 1e-3}
UNTIED = {
    **FULL,
    "data__test_split_size": 4,
    "trainer__eval_strategy": "steps",
    "trainer__eval_steps": 1,
    "trainer__max_steps": 3,
}
"""Of a model with a head of its own, evaluated on the way."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "given"),
    [
        ("sft", {"trainer__gradient_checkpointing": True}),
        ("sft", {**FULL, "trainer__gradient_accumulation_steps": 2}),
        ("sft", {"merge_adapter": True}),
        ("reward", {"data__test_split_size": 5, "trainer__max_steps": 2}),
        ("reward", FULL),
        ("reward", {"merge_adapter": True}),
        ("dpo", {}),
        ("dpo", UNTIED),
    ],
)
def test_half_of_every_weight_gives_what_all_of_it_gives(make_llama, tmp_path, stage, given):
    model = make_llama(tie=given is not UNTIED)
    one, two = (recipe(tmp_path, model, stage, batch=batch) for batch in (4, 2))
    alone = start([*CLI, stage, "--recipe", str(one), *settings(**given)])
    assert alone.returncode == 0, alone.stderr
    whole, expected = tmp_path / "out-4", losses(tmp_path / "out-4")
    assert len(expected) == given.get("trainer__max_steps", 4)
    assert expected[0] != pytest.approx(expected[-1], abs=1e-3)
    for way in WAYS:
        shards = tmp_path / way
        command = [*CLI, stage, "--recipe", str(two), "--output-dir", str(shards)]
        both = start([*command, *sharded(tmp_path, way), *settings(**given)])
        assert both.returncode == 0, both.stderr
        assert losses(shards) == pytest.approx(expected, abs=1e-5)
        assert_close(shards, whole)
        said = json.loads((shards / "summary.json").read_text())
        assert said["parameters_per_process"] < 0.55 * said["parameters"]
        if stage == "reward":
            assert_same_report(shards, whole)


@pytest.mark.slow
def test_one_process_holds_every_piece(llama, tmp_path):
    rows = recipe(tmp_path, llama, "sft", batch=4)
    alone = ["--num-processes", "1", "--accelerate", "fsdp2", *settings(trainer__max_steps=1)]
    done = start([*CLI, "sft", "--recipe", str(rows), *alone])
    assert done.returncode == 0, done.stderr
    said = json.loads((tmp_path / "out-4/summary.json").read_text())
    assert said["parameters_per_process"] == said["parameters"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_losses_of_bfloat16_pieces_are_in_float32(llama, tmp_path, stage):
    one, two = (recipe(tmp_path, llama, stage, batch=batch) for batch in (4, 2))
    given = settings(trainer__bf16=True, **FULL)
    alone = start([*CLI, stage, "--recipe", str(one), *given])
    assert alone.returncode == 0, alone.stderr
    both = start([*CLI, stage, "--recipe", str(two), *sharded(tmp_path, "fsdp2"), *given])
    assert both.returncode == 0, (
        both.stderr
    )  # the reward model scores as before when it is loaded again
    expected, found = losses(tmp_path / "out-4"), losses(tmp_path / "out-2")
    assert found == pytest.approx(expected, abs=0.02)
    if stage == "dpo":
        assert found[0] == pytest.approx(math.log(2), abs=1e-6)  # 0.6914 in bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["stack", "continue"])
def test_an_adapter_that_dpo_starts_from(llama, tmp_path, mode):
    (tmp_path / "sft").mkdir()
    sft = start([*CLI, "sft", "--recipe", str(recipe(tmp_path / "sft", llama, "sft", batch=4))])
    assert sft.returncode == 0, sft.stderr
    adapter = str(tmp_path / "sft/out-4/artifact")
    given = settings(model__adapter_name_or_path=adapter, model__adapter_mode=mode)
    one, two = (recipe(tmp_path, llama, "dpo", batch=batch) for batch in (4, 2))
    alone = start([*CLI, "dpo", "--recipe", str(one), *given])
    assert alone.returncode == 0, alone.stderr
    both = start([*CLI, "dpo", "--recipe", str(two), *sharded(tmp_path, "fsdp2"), *given])
    assert both.returncode == 0, both.stderr
    assert losses(tmp_path / "out-2") == pytest.approx(losses(tmp_path / "out-4"), abs=1e-5)
    assert_close(tmp_path / "out-2", tmp_path / "out-4")


def assert_same_report(run: Path, other: Path) -> None:
    found, wanted = (
        json.loads((one / "artifact/reward_report.json").read_text()) for one in (run, other)
    )
    assert found["pairs"] == wanted["pairs"]
    assert found["mean_reward"] == pytest.approx(wanted["mean_reward"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "stage", "given"),
    [("fsdp2", "dpo", {}), ("zero3", "sft", FULL), ("fsdp2", "sft", FULL)],
)
def test_a_killed_sharded_run_ends_with_the_weights_of_an_undisturbed_one(
    llama, tmp_path, way, stage, given
):
    if way not in WAYS:
        pytest.skip("DeepSpeed is not installed")
    rows = recipe(tmp_path, llama, stage, batch=2)
    steps = settings(trainer__max_steps=12, trainer__save_steps=2, **given)
    command = [*CLI, stage, "--recipe", str(rows), *sharded(tmp_path, way), *steps, "--output-dir"]
    undisturbed = start([*command, str(tmp_path / "undisturbed")])
    assert undisturbed.returncode == 0, undisturbed.stderr
    output = tmp_path / "killed"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with Popen([*command, str(output)], cwd=CHECKOUT, env=environment, stderr=DEVNULL) as run:
        deadline = time.monotonic() + 100
        while not list(tmp_path.glob("killed.partial/checkpoints/*/manifest.json")):
            assert run.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        for process in (*psutil.Process(run.pid).children(recursive=True), run):
            process.kill()
    assert not output.exists()
    again = start([*command, str(output)])
    assert again.returncode == 0, again.stderr
    assert "attempt 2" in again.stderr
    found, wanted = weights(output), weights(tmp_path / "undisturbed")
    assert all(found[name].equal(wanted[name]) for name in wanted)
    steps_of = [len(losses(run)) for run in (output, tmp_path / "undisturbed")]
    assert steps_of[0] == steps_of[1]
