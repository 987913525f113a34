"""Pairs that share their beginning get the rewards and gradients of pairs computed one by one."""

from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
import trl
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
)
from trl.trainer.reward_trainer import DataCollatorForPreference

from align.training.flat import SEGMENTS, can_flatten
from align.training.pairs import agrees_with_padding, pairs_shared, share
from align.training.trainers import RewardTrainer

PAD = 0
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
    "pad_token_id": PAD,
    "num_labels": 1,
}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=5),
    "qwen2": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": Qwen3Config(**SHAPE),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
}
PAIRS = [
    {"chosen_ids": [1, 2, 3, 4, 5, 6, 7], "rejected_ids": [1, 2, 3, 4, 20]},
    {"chosen_ids": [9, 21], "rejected_ids": [8, 22, 23, 24, 25, 26, 27, 28]},
    {"chosen_ids": [5, 6, 7], "rejected_ids": [5, 6, 7]},
    {"chosen_ids": [5, 6], "rejected_ids": [5, 6, 7, 8]},
]
tokens = st.lists(st.integers(1, 3), min_size=1, max_size=8)
pairs_of_tokens = st.lists(st.tuples(tokens, tokens), min_size=1, max_size=5)


def make(family: str, kind=AutoModelForSequenceClassification):
    torch.manual_seed(0)
    return kind.from_config(FAMILIES[family])


def batch_of(pairs):
    batch = DataCollatorForPreference(pad_token_id=PAD)(pairs)
    return batch["input_ids"], batch["attention_mask"]


def examples(pairs):
    return [{"chosen_ids": chosen, "rejected_ids": rejected} for chosen, rejected in pairs]


@given(pairs_of_tokens)
def test_a_row_holds_every_token_once_and_each_cell_finds_its_own(pairs):
    ids, mask = batch_of(examples(pairs))
    found = share(ids, mask)
    commons = []
    for chosen, rejected in pairs:
        common = 0
        while common < min(len(chosen), len(rejected)) - 1 and chosen[common] == rejected[common]:
            common += 1
        commons.append(common)
    lengths = [len(chosen) + len(rejected) for chosen, rejected in pairs]
    assert found.ids.shape == found.positions.shape == (1, sum(lengths) - sum(commons))
    wanted = [
        part
        for (chosen, rejected), common in zip(pairs, commons, strict=True)
        for part in ((len(chosen), 0), (len(rejected) - common, common))
    ]
    assert [tuple(segment) for segment in found.segments] == wanted
    cells = mask.bool()
    assert torch.equal(found.ids[0][found.places][cells], ids[cells])
    columns = torch.arange(ids.shape[1]).expand_as(ids)
    assert torch.equal(found.positions[0][found.places][cells], columns[cells])


@settings(max_examples=25, deadline=None)
@given(pairs_of_tokens)
@torch.no_grad()
def test_any_pairs_get_the_rewards_of_padded_rows(pairs):
    model = make("mistral").eval()
    ids, mask = batch_of(examples(pairs))
    wanted = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    with pairs_shared(model):
        found = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", [AutoModelForSequenceClassification, AutoModelForCausalLM])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_padded_rows(family, kind, checkpointing):
    ids, mask = batch_of(PAIRS)
    cells = mask.bool() if kind is AutoModelForCausalLM else slice(None)
    found = []
    for shared in (True, False):
        model = make(family, kind).train()
        assert can_flatten(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with pairs_shared(model) if shared else nullcontext():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            (logits[cells] ** 2).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[1].items():
        assert_close(found[0][name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


@torch.no_grad()
def test_afterwards_the_model_is_as_before():
    model = make("llama").eval()
    rows = torch.tensor([[1, 2, 3]])
    before = model(rows, use_cache=False).logits
    with pytest.raises(RuntimeError, match="stop"), pairs_shared(model):
        raise RuntimeError("stop")
    assert torch.equal(model(rows, use_cache=False).logits, before)
    assert model.config._attn_implementation != SEGMENTS


@pytest.mark.parametrize("family", FAMILIES)
def test_agreement_with_padding_is_seen(family):
    model = make(family).train()
    assert agrees_with_padding(model, *batch_of(PAIRS))
    assert model.training


def test_disagreement_with_padding_is_seen(monkeypatch):
    """A row whose positions are wrong stands for an architecture that reads it otherwise."""

    def elsewhere(ids, mask):
        found = share(ids, mask)
        return found._replace(positions=found.positions * 3)

    monkeypatch.setattr("align.training.pairs.share", elsewhere)
    assert not agrees_with_padding(make("llama"), *batch_of(PAIRS))


def trainer_of(config, tokenizer, folder, **more):
    torch.manual_seed(0)
    return RewardTrainer(
        model=AutoModelForSequenceClassification.from_config(deepcopy(config)),
        args=trl.RewardConfig(
            str(folder), report_to=[], use_cpu=True, bf16=False, max_steps=2, **more
        ),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )


def test_models_that_cannot_be_flat_get_padding(tokenizer, tmp_path):
    config = Gemma2Config(**SHAPE | {"vocab_size": len(tokenizer)}, attn_logit_softcapping=5.0)
    trainer = trainer_of(config, tokenizer, tmp_path)
    assert not can_flatten(trainer.model)
    assert trainer.shares_prompts is False


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_the_same_on_padded_rows(tokenizer, tmp_path, monkeypatch, checkpointing):
    config = LlamaConfig(**SHAPE | {"vocab_size": len(tokenizer)})
    more = {"gradient_checkpointing": checkpointing}
    usual = trainer_of(config, tokenizer, tmp_path / "shared", **more)
    usual.train()
    assert usual.shares_prompts
    monkeypatch.setattr("align.training.trainers.agrees_with_padding", lambda *_: False)
    unusual = trainer_of(config, tokenizer, tmp_path / "padded", **more)
    unusual.train()
    assert unusual.shares_prompts is False
    for one, other in zip(usual.model.parameters(), unusual.model.parameters(), strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-5)
