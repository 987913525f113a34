"""FSDP2 and ZeRO-3 in recipes and in force: what is refused before a model is loaded."""

import json
from pathlib import Path

import pytest
import yaml

from align.config.load import load_stage
from align.config.sharding import asked_sharding, sharding_in_force, sharding_troubles
from align.errors import AlignError
from align.resources import shipped

ROWS = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(ROWS)


def recipe(stage: str = "sft", accelerate: str = "fsdp2", **values: object) -> str:
    given = {
        "stage": stage,
        "output_dir": "out",
        "model": {"model_name_or_path": "org/base"},
        "data": {"dataset_name": "rows.jsonl"},
        "launch": {"accelerate": accelerate, "num_processes": 2},
    }
    Path("r.yaml").write_text(json.dumps(given | values))
    return "r.yaml"


def problems(*given: str, **values: object) -> dict[str, str]:
    with pytest.raises(AlignError) as caught:
        load_stage(recipe(**values), given)
    return {problem.key: problem.message for problem in caught.value.problems}


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
@pytest.mark.parametrize("way", ["fsdp2", "zero3"])
def test_training_stages_take_the_shipped_configs(stage, way):
    assert load_stage(recipe(stage, way)).config.launch.accelerate == way


@pytest.mark.parametrize("way", ["fsdp2", "zero3"])
def test_stages_that_need_whole_weights_say_so(way):
    found = problems("scorer.judge=null", stage="sample", accelerate=way)
    assert "`sample` needs them whole" in found["launch.accelerate"]
    found = problems(stage="ppo", accelerate=way, scorer={"reward_model": "org/rm"})
    assert "`ppo` needs them whole" in found["launch.accelerate"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.load_in_4bit", "true"),
        ("model.load_in_8bit", "true"),
        ("lora.lora_modules_to_save", "[lm_head]"),
        ("lora.trainable_token_indices", "[1]"),
        ("trainer.keep_checkpoints", "2"),
        ("precompute_ref_log_probs", "true"),
    ],
)
def test_what_needs_whole_weights_is_refused_by_its_key(key, value):
    found = problems(f"{key}={value}", stage="dpo")
    assert list(found) == [key]
    assert "needs whole weights" in found[key]


def test_optimizers_of_bitsandbytes_are_refused_under_fsdp2_alone():
    assert list(problems("trainer.optim=paged_adamw_32bit")) == ["trainer.optim"]
    assert load_stage(recipe(accelerate="zero3"), ["trainer.optim=adamw_8bit"])
    assert load_stage(recipe(), ["trainer.optim=adamw_torch_8bit"])


def test_dora_is_refused_under_zero3_alone():
    assert load_stage(recipe(), ["lora.use_dora=true"]).config.lora.use_dora
    assert list(problems("lora.use_dora=true", accelerate="zero3")) == ["lora.use_dora"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fsdp_version": 1}, "asks for FSDP 1"),
        ({"fsdp_version": None}, "asks for FSDP"),
        ({"fsdp_state_dict_type": "FULL_STATE_DICT"}, "one piece"),
    ],
)
def test_what_an_own_fsdp_config_may_not_ask_for(changes, said):
    given = yaml.safe_load((shipped("recipes") / "accelerate/fsdp2.yaml").read_text())
    given["fsdp_config"] |= changes
    Path("own.yaml").write_text(yaml.safe_dump(given))
    assert said in problems(accelerate="own.yaml")["launch.accelerate"]


def test_the_stage_of_zero_is_read_from_deepspeeds_own_file():
    given = {
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {"deepspeed_config_file": "ds.json"},
    }
    Path("own.yaml").write_text(yaml.safe_dump(given))
    for stage, way in ((2, None), (3, "ZeRO-3")):
        Path("ds.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        config = load_stage(recipe(accelerate="own.yaml")).config
        found = asked_sharding(config.launch)
        assert (found and found.way) == way
        variables = {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json",
        }
        force = sharding_in_force(variables)
        assert (force and force.way) == way


@pytest.mark.parametrize(
    "variables",
    [
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
        {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
    ],
)
def test_a_launcher_that_shards_is_told_the_same(variables, monkeypatch):
    from align.runs import run_stage

    given = {"scorer": {"reward_model": "org/rm"}}
    config = load_stage(recipe("ppo", "ddp", **given)).config
    (trouble,) = sharding_troubles(config, sharding_in_force(variables))
    assert trouble.key == ("launch", "accelerate")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = load_stage(
        recipe("ppo", "ddp", **given), ["launch.accelerate=null", "num_processes=1"]
    ).config
    with pytest.raises(AlignError, match="needs them whole"):
        run_stage(config)
    assert not Path("out").exists()


def test_nothing_is_sharded_without_a_word_of_it():
    assert sharding_in_force({}) is None
    assert (
        sharding_in_force(
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
        )
        is None
    )
    assert asked_sharding(load_stage(recipe(accelerate="ddp")).config.launch) is None
