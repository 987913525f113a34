"""The quick way through a model gives the model's own numbers, or another way is taken."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from align.generation.scoring import token_logprobs
from align.ppo.experience import Episode
from align.ppo.forward import Forward

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.5,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
EPISODES = [
    Episode(0, [1, 2, 3], [20, 21], True, ""),
    Episode(1, [4], [22, 23, 24, 25, 26], True, ""),
    Episode(2, [5, 6, 7, 8], [27], False, ""),
]
ODD = {
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=2.0, sliding_window=4)
    ),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.25)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=4.0)),
}


def tokens(model, temperature):
    found = token_logprobs(
        model,
        [episode.prompt_ids for episode in EPISODES],
        [episode.completion_ids for episode in EPISODES],
        temperature=temperature,
    )
    return torch.tensor([value for row in found for value in row])


def settled(model, temperature=1.0):
    forward = Forward(model, temperature)
    left = forward.settle(model, EPISODES)
    return forward, left


def completions(forward, model):
    return forward.completions(model, forward.batch(EPISODES, torch.device("cpu")))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@torch.no_grad()
def test_a_llama_needs_neither_padding_nor_logits(temperature):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    forward, left = settled(model, temperature)
    assert (forward.padded, forward.own_logits) == (False, False)
    assert left < 1e-4
    logprobs, entropy, states = completions(forward, model)
    assert_close(logprobs, tokens(model, temperature), rtol=1e-4, atol=1e-4)
    assert states.shape == (8, 32)
    logits = model.lm_head(states) / temperature
    assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy())


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("name", ODD)
@torch.no_grad()
def test_heads_that_scale_or_cap_are_found_out(name, temperature):
    torch.manual_seed(0)
    model = ODD[name]().eval()
    forward, left = settled(model, temperature)
    assert forward.own_logits
    assert left < 1e-4
    logprobs, entropy, states = completions(forward, model)
    assert_close(logprobs, tokens(model, temperature), rtol=1e-4, atol=1e-4)
    assert (entropy > 0).all()
    assert states.shape == (8, 32)


@torch.no_grad()
def test_a_head_with_a_bias_is_found_out():
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(**SHAPE)).eval()
    model.lm_head.bias.normal_()
    forward, left = settled(model)
    assert left < 1e-4
    assert_close(completions(forward, model)[0], tokens(model, 1.0), rtol=1e-4, atol=1e-4)


def test_an_adapter_on_the_head_is_part_of_the_log_probabilities():
    """Its product is zero at first, so the numbers alone do not tell: it must be trained all the same."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False))
    settings = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(model, settings).eval()
    forward, _ = settled(model)
    completions(forward, model)[0].sum().backward()
    gradients = [
        parameter.grad for name, parameter in model.named_parameters() if "lm_head.lora_B" in name
    ]
    assert gradients[0] is not None
    assert gradients[0].abs().max() > 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
        found = completions(forward, model)[0]
    assert_close(found, tokens(model, 1.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["flat", "padded", "logits"])
def test_all_ways_give_the_same_gradients(way):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    model.lm_head.weight.requires_grad_(False)
    found = []
    for mine in ("logits", way):
        model.zero_grad()
        forward = Forward(model, 0.7)
        forward.padded, forward.own_logits = mine != "flat", mine == "logits"
        logprobs = completions(forward, model)[0]
        with forward.attending(model):
            logprobs.square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*found, strict=True):
        assert_close(one, other, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_flat_row_that_does_not_agree_falls_back_to_padding(monkeypatch):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()

    def wrong(_, flat, *, padded=False):
        found = honest(_, flat, padded=padded)
        return found if padded else found * 1.1

    from align.ppo import forward as module

    honest = module.hidden_states
    monkeypatch.setattr(module, "hidden_states", wrong)
    forward, left = settled(model)
    assert (forward.padded, forward.own_logits) == (True, False)
    assert left < 1e-4
