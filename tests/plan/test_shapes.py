"""Parameter counts against published ones and against transformers' and PEFT's own models."""

import json

import pytest

from align.errors import AlignError
from align.plan.shapes import families, find_shape, known, shape_of

PUBLISHED = {
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B-Instruct": 70_553_706_496,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "google/gemma-2b": 2_506_172_416,
    "google/gemma-2-9b": 9_241_705_984,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen3-8B": 8_190_735_360,
}


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_published_counts(name, count):
    assert known(name).parameters == count


def test_deepseek_but_for_the_router_biases():
    # 58 blocks with 256 experts: transformers keeps the correction bias as a buffer.
    assert known("deepseek-ai/DeepSeek-V3").parameters + 58 * 256 == 671_026_419_200


def test_kv_cache_of_the_herd_in_kib_per_token():
    sizes = {name: known(f"llama-3.1-{name}").kv_bytes / 1024 for name in ("8b", "70b", "405b")}
    assert sizes == {"8b": 128, "70b": 320, "405b": 504}


def test_lora_on_all_linear_layers():
    assert known("llama-3.1-8b").adapter(16, "all-linear") == 41_943_040
    queries = known("llama-3.1-8b").adapter(16, ["q_proj", "v_proj"])
    assert queries == 32 * 16 * (4096 + 4096 + 4096 + 1024)
    assert known("llama-3.1-8b").adapter(16, "q_proj|v_proj") == queries
    assert known("llama-3.1-8b").adapter(16, "(") == 0


TINY = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "vocab_size": 128, "head_dim": 16, "max_position_embeddings": 64,
}  # fmt: skip
KINDS = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {},
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {},
    "phi3": {"pad_token_id": 0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
        "moe_intermediate_size": 32, "first_k_dense_replace": 1, "q_lora_rank": 24, "kv_lora_rank": 16,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_those_of_the_libraries(kind):
    import torch
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {**TINY, "tie_word_embeddings": False, **KINDS[kind]}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config))
        shape = shape_of(kind, {**config, "model_type": kind})
        assert shape.parameters == sum(one.numel() for one in model.parameters())
        lora = LoraConfig(r=4, target_modules="all-linear", task_type=TaskType.CAUSAL_LM)
        adapted = get_peft_model(model, lora)
    trained = sum(one.numel() for one in adapted.parameters() if one.requires_grad)
    assert shape.adapter(4, "all-linear") == trained


def test_a_local_folder_wins(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "model_type": "llama"}))
    assert find_shape(str(tmp_path)).hidden == 64


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "cannot be read"), ("[]", "JSON object"), ('{"hidden_size": 8}', "num_hidden_layers")],
)
def test_a_broken_config_is_told(tmp_path, text, said):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(AlignError, match=said):
        find_shape(str(tmp_path))


def test_an_unknown_id_names_the_way_out():
    with pytest.raises(AlignError) as error:
        find_shape("meta-llama/Llama-3.1-8BB")
    (problem,) = error.value.problems
    assert "meta-llama/Llama-3.1-8B" in problem.hint


def test_every_family_is_read():
    for name, facts in families().items():
        for one in (name, *facts["ids"]):
            assert known(one).parameters > 1e8
