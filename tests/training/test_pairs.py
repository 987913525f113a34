"""Pairs that share their beginning get the rewards and gradients of pairs computed one by one."""

import pytest
import torch
import trl
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import (
    AutoModelForSequenceClassification,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
)
from trl.trainer.reward_trainer import DataCollatorForPreference

from align.training.flat import can_flatten, segments_attended
from align.training.pairs import (
    SharedPairs,
    agrees_with_padding,
    padded,
    pairs_read,
    shared_tokens,
)
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
    {"chosen_ids": [1, 2, 3, 4, 5, 6, 7], "rejected_ids": [1, 2, 3, 4, 20], "margin": 0.5},
    {"chosen_ids": [9, 21], "rejected_ids": [8, 22, 23, 24, 25, 26, 27, 28], "margin": 1.0},
    {"chosen_ids": [5, 6, 7], "rejected_ids": [5, 6, 7], "margin": 0.0},
    {"chosen_ids": [5, 6], "rejected_ids": [5, 6, 7, 8], "margin": 0.0},
]
sequences = st.lists(st.integers(1, 3), min_size=1, max_size=8)


def make(family: str, **more):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(FAMILIES[family], **more)
    with torch.no_grad():
        model.score.weight.mul_(5)
    return model


def rewards(model, batch):
    with segments_attended(model), pairs_read(model, batch) as inputs:
        inputs.pop("margin", None)
        return model(**inputs, use_cache=False).logits


@pytest.mark.parametrize(
    ("chosen", "rejected", "shared"),
    [([1, 2, 3], [1, 2, 4], 2), ([1], [1, 2], 0), ([1, 2], [1, 2], 1), ([1, 2], [3, 2], 0)],
)
def test_what_two_answers_begin_with(chosen, rejected, shared):
    assert shared_tokens(chosen, rejected) == shared


@given(st.lists(st.tuples(sequences, sequences), min_size=1, max_size=5))
def test_padded_pairs_are_the_rows_of_trls_collator(pairs):
    examples = [{"chosen_ids": c, "rejected_ids": r, "margin": 1.5} for c, r in pairs]
    wanted = DataCollatorForPreference(pad_token_id=PAD)(examples)
    batch = SharedPairs(pad_token_id=PAD)(examples)
    found = padded(batch, PAD)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name
    assert len(batch["last"]) == 2 * len(pairs)
    ends = [row[-1] for side in zip(*pairs, strict=True) for row in side]
    assert batch["input_ids"][0, batch["last"]].tolist() == ends
    tokens = [len(c) + len(r) - shared_tokens(c, r) for c, r in pairs]
    assert batch["input_ids"].numel() == sum(tokens)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(sequences, sequences), min_size=1, max_size=5))
def test_any_pairs_get_the_rewards_of_padded_rows(pairs):
    model = make("mistral").eval()
    examples = [{"chosen_ids": c, "rejected_ids": r} for c, r in pairs]
    batch = SharedPairs(pad_token_id=PAD)(examples)
    with torch.no_grad():
        wanted = model(**padded(batch, PAD), use_cache=False).logits
        assert_close(rewards(model, batch), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_padded_rows(family, checkpointing):
    batch = SharedPairs(pad_token_id=PAD)(PAIRS)
    found = []
    for flat in (True, False):
        model = make(family).train()
        assert can_flatten(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if flat:
            with segments_attended(model), pairs_read(model, batch) as inputs:
                inputs.pop("margin")
                loss = (model(**inputs, use_cache=False).logits ** 2).sum()
                loss.backward()
        else:
            rows = padded(batch, PAD)
            rows.pop("margin")
            loss = (model(**rows, use_cache=False).logits ** 2).sum()
            loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[1].items():
        assert_close(found[0][name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


def test_the_hooks_are_gone_afterwards():
    model = make("llama").eval()
    rows = torch.tensor([[1, 2, 3]])
    before = model(rows, use_cache=False).logits
    batch = SharedPairs(pad_token_id=PAD)(PAIRS)
    with pytest.raises(RuntimeError, match="stop"), pairs_read(model, batch):
        raise RuntimeError("stop")
    assert torch.equal(model(rows, use_cache=False).logits, before)
    assert model.config._attn_implementation != "align_segments"


@pytest.mark.parametrize("family", FAMILIES)
def test_agreement_with_padding_is_seen(family):
    model, batch = make(family).train(), SharedPairs(pad_token_id=PAD)(PAIRS)
    assert agrees_with_padding(model, batch, PAD)
    assert model.training


def test_disagreement_with_padding_is_seen():
    """A batch whose positions are wrong stands for an architecture that reads flat rows otherwise."""
    batch = SharedPairs(pad_token_id=PAD)(PAIRS)
    batch["position_ids"] = batch["position_ids"] * 3
    assert not agrees_with_padding(make("llama"), batch, PAD)


def test_models_that_cannot_be_flat_get_padding(tokenizer, tmp_path):
    config = Gemma2Config(**SHAPE | {"vocab_size": len(tokenizer)}, attn_logit_softcapping=5.0)
    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_config(config),
        args=trl.RewardConfig(str(tmp_path), report_to=[], use_cpu=True, bf16=False),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )
    assert not can_flatten(trainer.model)
    assert type(trainer.data_collator) is DataCollatorForPreference


def test_a_model_that_disagrees_is_trained_on_padded_rows(tokenizer, tmp_path, monkeypatch):
    def trainer(folder):
        torch.manual_seed(0)
        config = LlamaConfig(**SHAPE | {"vocab_size": len(tokenizer)})
        return RewardTrainer(
            model=AutoModelForSequenceClassification.from_config(config),
            args=trl.RewardConfig(
                str(tmp_path / folder), report_to=[], use_cpu=True, bf16=False, max_steps=2
            ),
            train_dataset=Dataset.from_list(PAIRS),
            processing_class=tokenizer,
        )

    usual = trainer("flat")
    flat = usual.train()
    assert usual.flat
    monkeypatch.setattr("align.training.trainers.agrees_with_padding", lambda *_: False)
    unusual = trainer("padded")
    rows = unusual.train()
    assert unusual.flat is False
    assert rows.training_loss == pytest.approx(flat.training_loss, rel=1e-4)
