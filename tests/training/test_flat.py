"""Sequences end to end give the hidden states of sequences one by one, with and without padding."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from align.ppo.roles import Roles
from align.training.flat import (
    SEGMENTS,
    Segment,
    can_flatten,
    flatten,
    hidden_states,
    segment_attention,
    segments_attended,
)

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
WINDOW = 5
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": WINDOW}),
    "qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
    "gemma": (GemmaForCausalLM, GemmaConfig, {}),
}
CPU = torch.device("cpu")
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11, 12]]
COMPLETIONS = [[20, 21], [22, 23, 24, 25, 26, 27, 28, 29], [30], [31, 32, 33, 34, 35, 36]]


def make(name: str, **more):
    kind, config, own = MODELS[name]
    torch.manual_seed(0)
    return kind(config(**SHAPE, **own | more)).eval()


def one_by_one(model):
    parts = [
        model.model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False)[0][0]
        for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    return torch.cat(parts)


def test_a_flat_batch_knows_its_places():
    flat = flatten([[1, 2], [3]], [[4], [5, 6]], CPU)
    assert flat.ids.tolist() == [1, 2, 4, 3, 5, 6]
    assert flat.positions.tolist() == [0, 1, 2, 0, 1, 2]
    assert flat.lengths == [3, 3]
    assert flat.rows.tolist() == [1, 3, 4]
    assert flat.targets.tolist() == [4, 5, 6]
    assert flat.last.tolist() == [2, 5]
    assert flat.ids[flat.rows + 1].tolist() == flat.targets.tolist()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_flat_padded_and_single_sequences_agree(name, attention):
    model = make(name, attn_implementation=attention)
    assert can_flatten(model)
    flat = flatten(PROMPTS, COMPLETIONS, CPU)
    wanted = one_by_one(model)
    assert_close(hidden_states(model, flat), wanted, rtol=1e-4, atol=1e-4)
    assert_close(hidden_states(model, flat, padded=True), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "without"),
    [("mistral", {"sliding_window": None}), ("qwen2", {"use_sliding_window": False})],
)
@torch.no_grad()
def test_the_window_is_shorter_than_these_sequences(name, without):
    """Without its window the model gives other states, so the test above sees the window."""
    flat = flatten(PROMPTS, COMPLETIONS, CPU)
    narrow, wide = (hidden_states(make(name, **more), flat) for more in ({}, without))
    assert (narrow - wide).abs().max() > 1e-2


@torch.no_grad()
def test_a_sequence_does_not_see_its_neighbours():
    model = make("llama")
    flat = flatten(PROMPTS, COMPLETIONS, CPU)
    swapped = flatten(PROMPTS[::-1], COMPLETIONS[::-1], CPU)
    first = hidden_states(model, flat).split(flat.lengths)
    second = hidden_states(model, swapped).split(swapped.lengths)
    for one, other in zip(first, second[::-1], strict=True):
        assert_close(one, other, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_window_mask_of_one_segment_by_hand():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 6, 4) for _ in range(3))
    found, weights = segment_attention(
        None, query, key, value, None, scaling=0.5, sliding_window=3, segments=[Segment(6)]
    )
    assert weights is None
    scores = query @ key.transpose(2, 3) * 0.5
    for row in range(6):
        for column in range(6):
            if column > row or row - column >= 3:
                scores[..., row, column] = -torch.inf
    assert_close(found, (scores.softmax(-1) @ value).transpose(1, 2))


def with_adapters():
    model = get_peft_model(make("llama"), LoraConfig(r=2, task_type="CAUSAL_LM"))
    roles = Roles(model)
    roles.add_adapter("value", LoraConfig(r=2, task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return roles


@pytest.mark.parametrize("role", ["policy", "value"])
@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_gradient_checkpointing_gives_the_same_gradients(role, name):
    """The recomputed layers must see the same adapter and the same attention."""
    flat = flatten(PROMPTS, COMPLETIONS, CPU)
    found = []
    for recompute in (False, True):
        roles = with_adapters()
        if recompute:
            enable = getattr(roles, f"{name}_enable")
            enable(**{f"{name}_kwargs": {"use_reentrant": False}}, every_n_layers=1)
            assert roles.policy.base_model.model.is_activation_checkpointing
        roles.train()
        with roles.playing(role) as model, segments_attended(model):
            hidden_states(model, flat).square().sum().backward()
        gradients = {
            name: parameter.grad
            for name, parameter in roles.policy.named_parameters()
            if parameter.grad is not None
        }
        found.append(gradients)
    assert found[0].keys() == found[1].keys()
    adapter = "default" if role == "policy" else "value"
    assert all(f".{adapter}." in name for name in found[0])
    assert any(gradient.abs().max() > 0 for gradient in found[0].values())
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_attention_of_before_comes_back_also_after_an_exception():
    model, flat = make("llama"), flatten(PROMPTS, COMPLETIONS, CPU)
    before = model.config._attn_implementation
    assert before != SEGMENTS
    hidden_states(model, flat)
    assert model.config._attn_implementation == before
    with segments_attended(model):
        hidden_states(model, flat)
        assert model.config._attn_implementation == SEGMENTS

    def fail(*_, **__):
        raise ZeroDivisionError

    model.model.layers[1].forward = fail
    with pytest.raises(ZeroDivisionError):
        hidden_states(model, flat)
    assert model.config._attn_implementation == before


def test_models_that_keep_a_state_or_cap_their_scores_are_not_flattened():
    torch.manual_seed(0)
    mamba = Mamba2Config(
        vocab_size=40, hidden_size=32, num_hidden_layers=1, state_size=4, num_heads=8, head_dim=8
    )
    assert not can_flatten(Mamba2ForCausalLM(mamba))
    assert not can_flatten(Gemma2ForCausalLM(Gemma2Config(**SHAPE)))


def test_chunked_attention_is_not_flattened():
    """Llama 4's layers see their chunk through the mask alone, which the flat row does not have."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        **SHAPE,
        intermediate_size_mlp=48,
        num_local_experts=1,
        attention_chunk_size=4,
        no_rope_layers=[1, 1],
    )
    assert not can_flatten(Llama4ForCausalLM(config))
