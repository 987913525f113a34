"""SFT, reward and DPO from config to artifact on a random Llama, and the hand-over between them."""

import json
from pathlib import Path

import pytest
import torch

from align.config.sections import ModelSection
from align.errors import AlignError
from align.models.loading import load_any_policy, load_policy
from align.runs import run_stage
from align.stages.dpo import DPOConfig
from align.stages.reward import RewardConfig
from align.stages.sft import SFTConfig

TRAINER = {
    "per_device_train_batch_size": 2,
    "max_steps": 3,
    "gradient_checkpointing": False,
    "learning_rate": 1e-2,
    "logging_steps": 1,
}
IDS = torch.tensor([[0, 2, 40, 50, 60, 70, 4]])


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def chats(tmp_path: Path) -> str:
    return write_rows(
        tmp_path / "chats.jsonl",
        [
            {
                "messages": [
                    {"role": "user", "content": f"Count to {n}."},
                    {"role": "assistant", "content": " ".join(map(str, range(1, n + 1)))},
                ]
            }
            for n in range(2, 8)
        ],
    )


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    def side(text: str) -> list[dict]:
        return [{"role": "assistant", "content": text}]

    return write_rows(
        tmp_path / "pairs.jsonl",
        [
            {
                "prompt": [{"role": "user", "content": f"Name number {n}."}],
                "chosen": side(f"It is {n}."),
                "rejected": side("I do not know" + "!" * n),
                "margin": n / 10,
            }
            for n in range(1, 9)
        ],
    )


def run(kind, output: Path, model: dict, rows: str, **more) -> Path:
    config = kind.model_validate(
        {
            "output_dir": str(output),
            "model": model,
            "lora": {"lora_r": 4, "lora_alpha": 8},
            "data": {"dataset_name": rows, "max_length": 256},
            "trainer": TRAINER,
            **more,
        }
    )
    return run_stage(config, quiet=True) / "artifact"


def summary(artifact: Path) -> dict:
    return json.loads((artifact.parent / "summary.json").read_text())


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_sft_leaves_an_adapter_that_moved_the_model(llama, chats, tmp_path, lora):
    more = {"lora": {"lora_r": 4, **lora}}
    artifact = run(SFTConfig, tmp_path / "sft", {"model_name_or_path": str(llama)}, chats, **more)
    model, tokenizer = load_any_policy(str(artifact))
    base = load_policy(ModelSection(model_name_or_path=str(llama)))
    assert (model(IDS).logits - base(IDS).logits).abs().max() > 1e-3
    generation = json.loads((artifact / "generation_config.json").read_text())
    ends = {tokenizer.convert_tokens_to_ids(name) for name in ("<|eot_id|>", "<|end_of_text|>")}
    assert set(generation["eos_token_id"]) == ends
    assert generation["pad_token_id"] not in ends
    assert summary(artifact)["steps"] == 3
    assert not list(artifact.parent.rglob("training_args.bin"))


def test_sft_of_every_weight(llama, chats, tmp_path):
    artifact = run(
        SFTConfig,
        tmp_path / "full",
        {"model_name_or_path": str(llama)},
        chats,
        lora={"use_peft": False},
    )
    assert (artifact / "model.safetensors").exists()
    done = summary(artifact)
    assert done["trainable_parameters"] == done["parameters"]


def test_merged_weights_equal_base_and_adapter(llama, chats, tmp_path):
    model = {"model_name_or_path": str(llama)}
    control = {"lora": {"lora_r": 4, "trainable_token_indices": "control"}}
    adapter = run(SFTConfig, tmp_path / "adapter", model, chats, **control)
    merged = run(SFTConfig, tmp_path / "merged", model, chats, merge_adapter=True, **control)
    assert not (merged / "adapter_config.json").exists()
    one, _ = load_any_policy(str(adapter))
    other, _ = load_any_policy(str(merged))
    torch.testing.assert_close(one(IDS).logits, other(IDS).logits, rtol=1e-4, atol=1e-4)


def test_packing_gives_the_same_tokens_in_fewer_rows(llama, chats, tmp_path):
    artifact = run(
        SFTConfig,
        tmp_path / "packed",
        {"model_name_or_path": str(llama)},
        chats,
        data={"dataset_name": chats, "max_length": 512, "packing": True},
    )
    assert summary(artifact)["tokens"] > 0


def test_reward_model_is_reloaded_and_reported(llama, pairs, tmp_path):
    artifact = run(
        RewardConfig,
        tmp_path / "reward",
        {"model_name_or_path": str(llama)},
        pairs,
        data={"dataset_name": pairs, "test_split_size": 0.25},
        use_margin=True,
    )
    report = json.loads((artifact / "reward_report.json").read_text())
    assert report["pairs_from"] == "held-out split"
    assert report["pairs"] == 2
    assert report["by_margin"]
    assert summary(artifact)["reload_difference"] < 1e-4
    saved = json.loads((artifact / "adapter_config.json").read_text())
    assert saved["task_type"] == "SEQ_CLS"
    assert "score" in saved["modules_to_save"]


def test_a_reward_model_may_train_the_control_tokens_of_a_base(llama, pairs, tmp_path):
    artifact = run(
        RewardConfig,
        tmp_path / "reward",
        {"model_name_or_path": str(llama)},
        pairs,
        lora={"trainable_token_indices": "control"},
    )
    saved = json.loads((artifact / "adapter_config.json").read_text())
    assert saved["trainable_token_indices"] == [0, 2, 3, 4]
    assert summary(artifact)["reload_difference"] < 1e-4


@pytest.fixture
def sft_adapter(llama, chats, tmp_path) -> Path:
    return run(SFTConfig, tmp_path / "before", {"model_name_or_path": str(llama)}, chats)


@pytest.fixture
def sft_merged(llama, chats, tmp_path) -> Path:
    model = {"model_name_or_path": str(llama)}
    return run(SFTConfig, tmp_path / "before-merged", model, chats, merge_adapter=True)


def first_line(artifact: Path, key: str) -> float:
    for line in (artifact.parent / "metrics.jsonl").read_text().splitlines():
        if key in (found := json.loads(line)):
            return float(found[key])
    raise LookupError(key)


@pytest.mark.parametrize("mode", ["merged", "stack", "continue", "full"])
def test_dpo_starts_at_its_reference_whatever_it_is_made_of(
    llama, sft_adapter, sft_merged, pairs, tmp_path, mode
):
    model = {"model_name_or_path": str(sft_merged)}
    if mode in ("stack", "continue"):
        model = {
            "model_name_or_path": str(llama),
            "adapter_name_or_path": str(sft_adapter),
            "adapter_mode": mode,
        }
    lora = {"use_peft": False} if mode == "full" else {"lora_r": 4}
    artifact = run(DPOConfig, tmp_path / "dpo", model, pairs, lora=lora)
    assert first_line(artifact, "loss") == pytest.approx(0.693147, abs=1e-4)
    assert first_line(artifact, "rewards/chosen") == pytest.approx(0.0, abs=1e-5)
    after, _ = load_any_policy(str(artifact))
    before, _ = load_any_policy(str(sft_adapter))
    assert (after(IDS).logits - before(IDS).logits).abs().max() > 1e-4
    if mode == "stack":
        saved = json.loads((artifact / "adapter_config.json").read_text())
        assert saved["r"] == 8
        assert saved["base_model_name_or_path"] == str(llama)


def test_the_reference_of_a_continued_adapter_has_its_trained_tokens(llama, chats, pairs, tmp_path):
    model = {"model_name_or_path": str(llama)}
    control = {"lora": {"lora_r": 4, "trainable_token_indices": "control"}}
    adapter = run(SFTConfig, tmp_path / "sft", model, chats, **control)
    model |= {"adapter_name_or_path": str(adapter), "adapter_mode": "continue"}
    artifact = run(DPOConfig, tmp_path / "dpo", model, pairs)
    assert first_line(artifact, "rewards/chosen") == pytest.approx(0.0, abs=1e-5)


def test_a_stack_that_cannot_be_saved_is_refused_before_training(llama, chats, pairs, tmp_path):
    model = {"model_name_or_path": str(llama)}
    control = {"lora": {"lora_r": 4, "trainable_token_indices": "control"}}
    adapter = run(SFTConfig, tmp_path / "sft", model, chats, **control)
    model["adapter_name_or_path"] = str(adapter)
    with pytest.raises(AlignError, match="merge_adapter: true"):
        run(DPOConfig, tmp_path / "dpo", model, pairs)
    assert not list(tmp_path.glob("dpo*"))


def test_precomputed_references_give_the_same_first_loss(llama, pairs, tmp_path):
    artifact = run(
        DPOConfig,
        tmp_path / "dpo",
        {"model_name_or_path": str(llama)},
        pairs,
        precompute_ref_log_probs=True,
    )
    assert first_line(artifact, "loss") == pytest.approx(0.693147, abs=1e-4)


def test_a_reward_model_over_a_policy_adapter_needs_merging(llama, sft_adapter, pairs, tmp_path):
    model = {"model_name_or_path": str(llama), "adapter_name_or_path": str(sft_adapter)}
    with pytest.raises(AlignError, match="merge_adapter: true"):
        run(RewardConfig, tmp_path / "reward", model, pairs)
    artifact = run(RewardConfig, tmp_path / "reward", model, pairs, merge_adapter=True)
    assert summary(artifact)["reload_difference"] < 1e-4
