"""The memory model: hand-worked sizes, limits that must hold, and fake steps of the real trainers."""

from dataclasses import replace

import pytest

from align.plan.fleet import fewest_for_inference, fewest_for_training
from align.plan.gpus import GPUS, find_gpu
from align.plan.memory import (
    GIB,
    Training,
    generation_memory,
    loss_bytes,
    optimizer_bytes,
    saved,
    training_memory,
    weight_bytes,
)
from align.plan.shapes import known

EIGHT = known("llama-3.1-8b")
SEVENTY = known("llama-3.1-70b")
LORA = Training(EIGHT, 2048, adapter=41_943_040, adapter_bytes=2)


def test_weights_by_hand():
    linear, embeddings, small = 6_979_321_856, 2 * 525_336_576, 266_240
    assert EIGHT.linear == linear
    assert weight_bytes(EIGHT, "bfloat16") == 2 * 8_030_261_248
    nested = 0.5 + 1 / 64 + 4 / 16384
    assert weight_bytes(EIGHT, "nf4-double") == linear * nested + 2 * (embeddings + small)
    assert weight_bytes(EIGHT, "nf4") == linear * 0.5625 + 2 * (embeddings + small)
    # prepare_model_for_kbit_training would add two bytes per embedding parameter
    wide = weight_bytes(EIGHT, "nf4", embedding_bytes=4) - weight_bytes(EIGHT, "nf4")
    assert wide == 2 * embeddings


def test_full_fine_tuning_in_16_bits_is_eight_bytes_per_parameter():
    memory = training_memory(Training(EIGHT, 1))
    assert memory.states == 8 * EIGHT.parameters


def test_what_a_block_keeps_by_hand():
    # eager, adapters in the base's type: 16 H + 4 KV + 8 I bytes per token
    assert saved(LORA) == 16 * 4096 + 4 * 1024 + 8 * 14336


def test_optimizers():
    assert optimizer_bytes("adamw_torch", 4) == 8
    assert optimizer_bytes("adamw_8bit", 4) == pytest.approx(2.03, abs=0.01)
    assert optimizer_bytes("adafactor", 4) == 0


def test_checkpoints_cost_the_blocks_inputs_only():
    with_, without = (training_memory(replace(LORA, checkpointing=how)) for how in ("full", "none"))
    assert with_.activations == 2 * 4096 * 32 * 2048
    assert without.activations == saved(LORA) * 32 * 2048


@pytest.mark.parametrize(
    ("change", "larger"),
    [
        ({"tokens": 4096}, True),
        ({"weights": "float32"}, True),
        ({"weights": "nf4-double"}, False),
        ({"checkpointing": "none"}, True),
        ({"checkpointing": "host"}, False),
        ({"dropout": True}, True),
        ({"adapter_bytes": 4, "autocast": True}, True),
        ({"optimizer": "adamw_8bit"}, False),
        ({"loss": "logits", "tokens": 8192}, True),
        ({"shards": 4}, False),
    ],
)
def test_which_way_a_setting_pulls(change, larger):
    before = training_memory(LORA).total
    after = training_memory(replace(LORA, **change)).total
    assert (after > before) is larger


def test_tiles_do_not_grow_with_the_vocabulary():
    long = replace(LORA, tokens=65536)
    assert loss_bytes(long) == 4096 * 2 * 32768 + 6 * 4096 * 65536
    assert loss_bytes(replace(long, loss="logits")) == 12 * 128256 * 65536


def test_foreach_takes_another_copy_for_the_update():
    full = Training(EIGHT, 128, weights="float32", autocast=True, optimizer="adamw_torch")
    memory = training_memory(full)
    assert memory.phase == "optimizer step"
    assert memory.total == 20 * EIGHT.parameters
    fused = training_memory(replace(full, optimizer="adamw_torch_fused"))
    assert fused.total < 17 * EIGHT.parameters


def test_the_cache_of_generation():
    memory = generation_memory(EIGHT, "bfloat16", sequences=16, prompts=1, prompt=512, new=512)
    assert memory.kv_cache == 128 * 1024 * 16 * 1024


def test_fewest_gpus_of_the_herd():
    training = fewest_for_training(SEVENTY, find_gpu("h100"))
    assert training["full"] > training["LoRA"] > training["QLoRA"] == 1
    assert fewest_for_inference(SEVENTY, find_gpu("h100")) == {"FP16": 2, "FP8": 1, "INT4": 1}
    assert fewest_for_inference(known("llama-3.1-405b"), find_gpu("h100")) == {
        "FP16": 10,
        "FP8": 5,
        "INT4": 3,
    }
    for gpu in GPUS.values():
        counts = fewest_for_training(SEVENTY, gpu)
        for way, count in counts.items():
            assert count is None or count >= 1, (gpu, way)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [("4090", "RTX-4090"), ("rtx 4090", "RTX-4090"), ("A100", "A100-80"), ("a100-40GB", "A100-40")],
)
def test_spellings_of_gpus(spelling, name):
    assert find_gpu(spelling).name == name


STEPS = [
    ("nf4-double", 16, True, "sft"),
    ("nf4-double", 16, False, "sft"),
    ("bfloat16", 16, True, "sft"),
    ("bfloat16", 16, False, "dpo"),
    ("float32", 0, True, "sft"),
    ("bfloat16", 16, True, "reward"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "rank", "checkpointing", "loss"), STEPS)
def test_the_formulas_count_what_the_trainers_make(weights, rank, checkpointing, loss):
    """Two blocks of Llama 3 8B, long rows: within 5 % of a real step on fake tensors."""
    from align.training.fake_step import Step, fake_step

    shape = replace(EIGHT, layers=2)
    pair = 1 if loss == "sft" else 2
    counted = fake_step(
        Step(
            config={**shape.config, "num_hidden_layers": 2},
            loss=loss,
            weights=weights,
            rows=pair,
            length=4096 // pair,
            checkpointing=checkpointing,
            autocast=True,
            lora={"r": rank, "target_modules": "all-linear"} if rank else None,
        )
    )
    if loss == "reward":
        shape = shape.without_head()
    adapter = shape.adapter(rank, "all-linear") if rank else 0
    given = Training(
        shape,
        4096,
        weights=weights,
        adapter=adapter,
        adapter_bytes=2 if weights.startswith("nf4") else 4,
        optimizer="adamw_torch",
        autocast=True,
        checkpointing="full" if checkpointing else "none",
        loss="none" if loss == "reward" else "tiles",
    )
    assert training_memory(given).total == pytest.approx(counted.peak, rel=0.05)
    assert counted.trainable == (adapter or shape.parameters) + (4096 if loss == "reward" else 0)
    assert sum(counted.at_peak.values()) == counted.peak


@pytest.mark.slow
def test_a_fake_step_sees_what_checkpointing_saves():
    from align.training.fake_step import Step, fake_step

    step = Step(
        config={**EIGHT.config, "num_hidden_layers": 2},
        loss="sft",
        weights="nf4",
        rows=1,
        length=2048,
        checkpointing=False,
        autocast=True,
        lora={"r": 16, "target_modules": "all-linear"},
    )
    kept, dropped = fake_step(step), fake_step(replace(step, checkpointing=True))
    one_block = saved(LORA) * 2048
    assert kept.peak - dropped.peak == pytest.approx(one_block, rel=0.2)
    # nf4 without double quantization: half a byte and a float32 per 64 weights, and the 16-bit rest
    expected = weight_bytes(replace(EIGHT, layers=2), "nf4")
    assert kept.at_peak["weights"] == pytest.approx(expected, rel=1e-3)
    assert kept.peak < 8 * GIB
