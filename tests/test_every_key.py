"""Every key does something: flip it, and what the libraries get changes.

`FLIPS` holds, for each key of each training stage, another value. A key without an entry fails, so a new
knob brings its flip with it. Keys of sampling and evaluation are flipped too; what they change is what the
sampler, the scorer, the judge or the rows get, recorded at that seam.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from align.config.fields import leaf_fields
from align.config.sections import DataSection, Section, StageConfig
from align.errors import AlignError
from align.models.adapters import lora_config
from align.models.identity import Artifact
from align.models.loading import load_arguments
from align.stages.average import AverageConfig
from align.stages.dpo import DPOConfig
from align.stages.evaluate import EvalConfig
from align.stages.ppo import PPOConfig
from align.stages.reward import RewardConfig
from align.stages.sample import SampleConfig
from align.stages.sft import SFTConfig
from align.training.arguments import (
    dpo_arguments,
    ppo_arguments,
    reward_arguments,
    sft_arguments,
)

TRAINING = {
    SFTConfig: sft_arguments,
    RewardConfig: reward_arguments,
    DPOConfig: dpo_arguments,
    PPOConfig: ppo_arguments,
}

FLIPS: dict[str, Any] = {
    "model.model_revision": "v2",
    "model.dtype": "float16",
    "model.attn_implementation": "eager",
    "model.load_in_4bit": True,
    "model.load_in_8bit": True,
    "model.bnb_4bit_quant_type": "fp4",
    "model.use_bnb_nested_quant": False,
    "lora.use_peft": False,
    "lora.lora_r": 3,
    "lora.lora_alpha": 7,
    "lora.lora_dropout": 0.25,
    "lora.lora_target_modules": ["q_proj"],
    "lora.lora_modules_to_save": ["embed_tokens"],
    "lora.trainable_token_indices": [1, 2],
    "lora.use_dora": True,
    "lora.use_rslora": True,
    "trainer.per_device_train_batch_size": 3,
    "trainer.per_device_eval_batch_size": 3,
    "trainer.gradient_accumulation_steps": 3,
    "trainer.learning_rate": 0.5,
    "trainer.num_train_epochs": 7.0,
    "trainer.max_steps": 7,
    "trainer.lr_scheduler_type": "constant",
    "trainer.lr_scheduler_kwargs": {"num_cycles": 2},
    "trainer.warmup_steps": 7.0,
    "trainer.optim": "adamw_torch_fused",
    "trainer.weight_decay": 0.5,
    "trainer.adam_beta1": 0.5,
    "trainer.adam_beta2": 0.5,
    "trainer.adam_epsilon": 0.5,
    "trainer.max_grad_norm": 0.5,
    "trainer.gradient_checkpointing": False,
    "trainer.bf16": True,
    "trainer.seed": 7,
    "trainer.train_sampling_strategy": "sequential",
    "trainer.dataloader_num_workers": 1,
    "trainer.logging_steps": 7,
    "trainer.save_steps": 7,
    "trainer.save_total_limit": 7,
    "trainer.eval_strategy": "steps",
    "trainer.eval_steps": 7,
    "trainer.report_to": ["tensorboard"],
    "trainer.loss_type": "dft",
    "trainer.extra": {"neftune_noise_alpha": 5.0},
    "data.packing": True,
    "center_rewards_coefficient": 0.5,
    "beta": 0.5,
    "loss_type": ["ipo", "sft"],
    "loss_weights": [0.5],
    "rpo_alpha": 0.2,
    "label_smoothing": 0.25,
    "f_divergence_type": "js_divergence",
    "precompute_ref_log_probs": True,
}
"""Keys whose effect is seen in the arguments of TRL, PEFT or from_pretrained."""

NEEDS = {
    "model.bnb_4bit_quant_type": {"model": {"load_in_4bit": True}},
    "model.use_bnb_nested_quant": {"model": {"load_in_4bit": True}},
    "trainer.eval_steps": {"trainer": {"eval_strategy": "steps"}},
}
"""What has to be set for a key to mean anything."""

SEEN_ELSEWHERE = {
    "trainer.keep_checkpoints": "tests/averaging/test_average.py",
    "output_dir": "tests/test_runs.py",
    "stage": "the command's own name",
    "launch.num_processes": "tests/test_launch.py",
    "launch.accelerate": "tests/test_launch.py",
    "model.model_name_or_path": "tests/models/test_loading.py",
    "model.adapter_name_or_path": "tests/models/test_loading.py",
    "model.adapter_mode": "tests/models/test_loading.py",
    "model.tokenizer_name_or_path": "tests/models/test_tokenizer.py",
    "model.chat_template_path": "tests/models/test_tokenizer.py",
    "model.chat_template": "tests/models/test_tokenizer.py",
    "mask_format_tokens": "tests/training/test_trainers.py",
    "use_margin": "tests/stages/test_training_stages.py",
    "merge_adapter": "tests/stages/test_training_stages.py",
    "padding_free": "tests/training/test_pairs.py",
}
HUB = {
    **dict.fromkeys(("repo_id", "base_model_id", "merged_dtype"), "tests/hub/test_stage.py"),
    **dict.fromkeys(("merged", "public", "revision", "pr", "collection"), "tests/hub/test_push.py"),
    "samples": "tests/hub/test_push.py",
}
SEEN_ELSEWHERE |= {f"hub.{key}": file for key, file in HUB.items()}
"""Keys whose effect is not an argument; the named test sees it. Data keys are flipped below."""


def merged(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    found = dict(base)
    for key, value in more.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = merged(found[key], value) if both else value
    return found


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def resolved(config: Any, folder: Path) -> dict[str, Any]:
    """Everything that the libraries are given for this config."""
    arguments = TRAINING[type(config)](config, folder)
    lora = lora_config(config.lora, reward=isinstance(config, RewardConfig))
    checkpoint = Artifact("org/model", "policy", config={"dtype": "bfloat16"})
    load = load_arguments(config.model, checkpoint, trained=not config.lora.use_peft)
    quantization = load.pop("quantization_config", None)
    return {
        "trainer": arguments.to_dict(),
        "lora": lora and lora.to_dict(),
        "load": {key: str(value) for key, value in load.items()},
        "quantization": quantization and quantization.to_dict(),
    }


CASES = [
    (kind, field.name)
    for kind in TRAINING
    for field in leaf_fields(kind)
    if field.name not in SEEN_ELSEWHERE and not field.name.startswith("data.")
    if kind is not PPOConfig or field.name.split(".")[0] in ("model", "lora", "trainer")
] + [(SFTConfig, "data.packing")]


@pytest.mark.parametrize(("kind", "key"), CASES, ids=lambda case: getattr(case, "__name__", case))
def test_flipping_a_key_changes_what_the_libraries_get(kind, key, tmp_path):
    assert key in FLIPS, f"a new key needs an entry in FLIPS: {key}"
    base = {
        "output_dir": "unused",
        "model": {"model_name_or_path": "org/model"},
        "data": {"dataset_name": "org/rows"},
    }
    if kind is PPOConfig:
        base["scorer"] = {"reward_funcs": {"number": 1.0}}
    base = merged(base, NEEDS.get(key, {}))
    before = resolved(kind.model_validate(base), tmp_path)
    after = resolved(kind.model_validate(merged(base, nested(key, FLIPS[key]))), tmp_path)
    assert before != after, f"{key} is read by nothing"


# --- rows ---------------------------------------------------------------------------------

CHATS = [
    [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": "one two " * n}]
    for n in range(1, 9)
]
DATA_FLIPS: dict[str, Any] = {
    "dataset_name": "other.jsonl",
    "dataset_train_split": "train[:50%]",
    "datasets": [{"path": "rows.jsonl", "weight": 3}, {"path": "other.jsonl", "weight": 1}],
    "test_split_size": 0.25,
    "dataset_test_split": "train[:25%]",
    "format": "text",
    "columns": {"messages": "more"},
    "system_prompt": "Be brief.",
    "max_samples": 3,
    "max_length": 60,
    "assistant_only_loss": False,
}


@pytest.fixture
def rows(tmp_path, monkeypatch) -> Path:
    """Two files of chats, with a second column of chats and one of plain text."""
    monkeypatch.chdir(tmp_path)
    table = [{"messages": chat, "more": chat[:2] * 2, "text": "plain"} for chat in CHATS]
    for name, part in (("rows", table), ("other", table[::-1][:5])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    return tmp_path


def token_rows(tokenizer, **data: Any) -> Any:
    from align.data.rendering import training_rows
    from align.stages.sft import SFTData

    section = SFTData.model_validate({"max_length": None, **data})
    rendered = training_rows(section, tokenizer, "sft", assistant_only=section.assistant_only_loss)
    parts = [rendered.train, rendered.test]
    return [part and [part["input_ids"][:], part["labels"][:]] for part in parts]


@pytest.mark.parametrize("key", DATA_FLIPS)
def test_flipping_a_data_key_changes_the_rows(rows, tokenizer, key):
    base: dict[str, Any] = {"dataset_name": "rows.jsonl", "format": "messages"}
    flipped = merged(base, {key: DATA_FLIPS[key]})
    if key == "datasets":
        del flipped["dataset_name"]
    assert token_rows(tokenizer, **base) != token_rows(tokenizer, **flipped)


def test_dropping_differs_from_cutting(rows, tokenizer):
    base = {"dataset_name": "rows.jsonl", "format": "messages", "max_length": 60}
    cut = token_rows(tokenizer, **base)
    assert cut != token_rows(tokenizer, **base, truncation_mode="drop")


def test_hub_configuration_reaches_load_dataset(tokenizer, monkeypatch):
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str | None = None, **more: Any) -> Dataset:
        asked.append((path, name, more.get("split")))
        return Dataset.from_list([{"messages": chat} for chat in CHATS])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("align.data.sources.load_dataset", load_dataset, raising=False)
    token_rows(tokenizer, dataset_name="org/rows", dataset_config="main")
    token_rows(tokenizer, datasets=[{"path": "org/rows", "name": "socratic", "split": "test"}])
    assert [one[:2] for one in asked] == [("org/rows", "main"), ("org/rows", "socratic")]


def test_every_data_key_is_flipped():
    # Rows with tools need another template: tests/data/test_tool_use.py leaves them out.
    flipped = set(DATA_FLIPS) | {"truncation_mode", "dataset_config", "use_tools"}
    # Processes change the speed of rendering only: tests/data sees that the rows are the same.
    known = set(DataSection.model_fields) | {"assistant_only_loss"}
    assert known - flipped == {"dataset_num_proc"}


def test_every_key_of_a_push_is_seen():
    from align.stages.push import PushConfig

    own = {field.name for field in leaf_fields(PushConfig)}
    assert own - SEEN_ELSEWHERE.keys() == {"run"}


# --- PPO: what a run of two rollouts shows ---------------------------------------------------

PPO_FLIPS: dict[str, Any] = {
    "total_episodes": 8,
    "num_ppo_epochs": 2,
    "num_mini_batches": 1,
    "kl_coef": 1.0,
    "kl_estimator": "k3",
    "kl_target": 1e-6,
    "kl_horizon": 100,
    "gamma": 0.5,
    "lam": 0.5,
    "lam_value": 0.5,
    "lam_length_alpha": 0.5,
    "cliprange": 1e-4,
    "cliprange_high": 1e-4,
    "dual_clip": 1.0001,
    "cliprange_value": 1e-4,
    "vf_coef": 5.0,
    "value_model": "policy",
    "value_learning_rate": 1e-4,
    "critic_warmup_steps": 1,
    "target_kl": 1e-12,
    "whiten_advantages": False,
    "whiten_rewards": True,
    "reward_normalization": "none",
    "reward_clip": 0.1,
    "missing_eos_penalty": 0.0,
    "missing_eos_score": -1.0,
    "sample_rollouts": 2,
    "generation.max_new_tokens": 4,
    "generation.num_generations": 2,
    "generation.temperature": 0.5,
    "generation.fold_adapter": False,
    "scorer.reward_funcs": {"test_codes": 2.0},
}
PPO_NEEDS = {
    "kl_horizon": {"kl_target": 1e-6},
    "vf_coef": {"value_model": "policy"},
    "target_kl": {"num_ppo_epochs": 2},  # the first update has ratio 1, the second sees what it did
}
PPO_ELSEWHERE = {
    "value_init": "tests/ppo/test_roles.py",
    "merge_adapter": "tests/stages/test_ppo.py",
    "scorer.reward_model": "tests/stages/test_ppo.py",
    "scorer.reward_model_weight": "tests/stages/test_ppo.py",
    "scorer.share_base": "tests/ppo/test_roles.py",
    "scorer.score_batch_size": "tests/stages/test_ppo.py",  # the scores do not change
    "generation.generation_batch_size": "tests/ppo/test_rollout.py",  # nor do the draws
    "generation.top_p": "tests/stages/test_ppo.py",  # refused
    "generation.top_k": "tests/stages/test_ppo.py",  # refused
    "alarms.patience": "tests/ppo/test_alarms.py",
    "alarms.length_growth": "tests/ppo/test_alarms.py",
    "alarms.kl_per_token": "tests/ppo/test_alarms.py",
    "alarms.eos_drop": "tests/ppo/test_alarms.py",
    "alarms.saturated_share": "tests/ppo/test_alarms.py",
    "alarms.unique_share": "tests/ppo/test_alarms.py",
    "alarms.critic_grace": "tests/ppo/test_alarms.py",
    "alarms.stop_on": "tests/ppo/test_trainer.py",
}


def test_every_key_of_ppo_is_flipped():
    shared = {"output_dir", "stage", "launch", "model", "lora", "trainer", "data", "hub"}
    own = {f.name for f in leaf_fields(PPOConfig) if f.name.split(".")[0] not in shared}
    assert own == PPO_FLIPS.keys() | PPO_ELSEWHERE.keys()
    for file in set(PPO_ELSEWHERE.values()):
        assert (Path(__file__).parent.parent / file).is_file()


@pytest.fixture(scope="module")
def ppo_run(llama, tmp_path_factory):
    """What a run of two rollouts drew, logged, learned and wrote; the same settings run once."""
    from ppo_runs import ppo_config, trained, weights

    from align.ppo.roles import Roles

    known: dict[str, Any] = {}

    def ppo_run(**more: Any) -> Any:
        name = json.dumps(more, sort_keys=True)
        if name not in known:
            folder = tmp_path_factory.mktemp("ppo")
            folded, fold = [], Roles.merged
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Roles, "merged", lambda roles: folded.append(1) or fold(roles))
                trainer = trained(ppo_config(llama, folder, **more))
            history = [
                {key: value for key, value in one.items() if not key.endswith("seconds")}
                for one in trainer.history
            ]
            learned = {key: value.tolist() for key, value in weights(trainer).items()}
            samples = (trainer.folder.path / "samples.jsonl").read_text()
            known[name] = json.dumps([history, learned, samples, trainer.kl_coef, len(folded)])
        return known[name]

    return ppo_run


@pytest.mark.slow
@pytest.mark.parametrize("key", PPO_FLIPS)
def test_flipping_a_key_of_ppo_changes_its_run(ppo_run, key):
    needed = PPO_NEEDS.get(key, {})
    before = ppo_run(**needed)
    assert before != ppo_run(**merged(needed, nested(key, PPO_FLIPS[key])))


@pytest.mark.slow
def test_ppo_runs_of_equal_settings_are_equal(ppo_run):
    """So that a difference above is the key's."""
    again = {"kl_coef": 0.05}  # the default
    assert ppo_run() == ppo_run(**again)


# --- sampling and evaluation: which keys does a run read? -----------------------------------


class _Reads:
    """Records which keys of a config are looked at."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, config: StageConfig) -> None:
        self.keys: set[str] = set()
        names = {id(config): ""}
        for name in type(config).model_fields:
            if isinstance(part := getattr(config, name), Section):
                names[id(part)] = f"{name}."
        plain = Section.__getattribute__

        def recorded(section: Section, name: str) -> Any:
            if id(section) in names and not name.startswith(("_", "model_")):
                self.keys.add(names[id(section)] + name)
            return plain(section, name)

        monkeypatch.setattr(Section, "__getattribute__", recorded)


def keys_of(kind: type[StageConfig]) -> set[str]:
    """Keys that only the stage's own `run` can read."""
    shared = {"output_dir", "stage", "launch", "model", "data"}
    return {field.name for field in leaf_fields(kind) if field.name.split(".")[0] not in shared}


@pytest.mark.slow
def test_a_sample_run_reads_every_key_of_its_own(llama, rows, monkeypatch):
    from align.runs import RunFolder

    config = SampleConfig.model_validate(
        {
            "output_dir": "sampled",
            "model": {"model_name_or_path": str(llama)},
            "data": {"dataset_name": "rows.jsonl", "format": "messages", "max_samples": 2},
            "generation": {"num_generations": 2, "max_new_tokens": 3},
            "scorer": {"judge": "contains"},
            "pairs": {"only_finished": False},
        }
    )
    monkeypatch.setattr("align.registry.JUDGES", {"contains": "tests.test_every_key:count_judge"})
    from align.stages.sample import run

    reads = _Reads(monkeypatch, config)
    run(config, RunFolder(config, quiet=True))
    assert keys_of(SampleConfig) - reads.keys <= {"scorer.score_batch_size"}


def count_judge(row: Any, completion: str) -> dict[str, float]:
    return {"score": float(len(completion))}


@pytest.mark.slow
def test_an_eval_run_reads_every_key_of_its_own(llama, rows, monkeypatch):
    from align.runs import RunFolder
    from align.stages.evaluate import run

    config = EvalConfig.model_validate(
        {
            "output_dir": "evaluated",
            "models": {"one": str(llama)},
            "data": {"dataset_name": "rows.jsonl", "format": "messages", "max_samples": 2},
            "generation": {"max_new_tokens": 3, "temperatures": [0.7]},
            "judge": "contains",
        }
    )
    monkeypatch.setattr("align.registry.JUDGES", {"contains": "tests.test_every_key:count_judge"})
    reads = _Reads(monkeypatch, config)
    run(config, RunFolder(config, quiet=True))
    unread = keys_of(EvalConfig) - reads.keys
    assert {key for key in unread if not key.startswith("models.")} <= {"score_batch_size"}


def test_averages_read_every_key_of_their_own(llama, tmp_path, monkeypatch):
    from averaging.test_average import adapter
    from transformers import AutoTokenizer

    from align.runs import RunFolder
    from align.stages.average import run

    tokenizer = AutoTokenizer.from_pretrained(llama)
    adapters = {
        name: adapter(llama, tmp_path / name, at, tokenizer) for at, name in enumerate("ab")
    }
    read: set[str] = set()
    for number, given in enumerate(
        [
            {"models": {"a": str(llama), "b": str(llama)}},
            {"models": adapters, "method": "svd", "svd_rank": 2},
        ]
    ):
        config = AverageConfig.model_validate({"output_dir": str(tmp_path / str(number)), **given})
        reads = _Reads(monkeypatch, config)
        run(config, RunFolder(config, quiet=True))
        read |= reads.keys
    assert {key for key in keys_of(AverageConfig) if not key.startswith("models.")} <= read


def test_both_scorers_at_once_are_refused():
    from align.stages.sample import check_scorer

    section = SampleConfig.model_validate(
        {
            "output_dir": "unused",
            "model": {"model_name_or_path": "org/model"},
            "data": {"dataset_name": "org/rows"},
            "scorer": {"judge": "number", "reward_model": "org/reward"},
        }
    )
    with pytest.raises(AlignError, match="both are given"):
        check_scorer(section.scorer)
