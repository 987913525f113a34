"""Rewards and log-probabilities do not depend on the batch, the padding or the pad token."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
)

from align.errors import AlignError
from align.generation import scoring
from align.generation.scoring import RewardScorer, by_length, sequence_logprobs, token_logprobs

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 128,
    "pad_token_id": 5,
    "num_labels": 1,
}


class Padding:
    """All that a scorer wants of a tokenizer."""

    pad_token_id = 5


def sequences(count: int = 12, longest: int = 20) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(6, 40, (n,), generator=generator).tolist() for n in lengths]


def classifier(kind: str):
    torch.manual_seed(0)
    if kind == "mistral":
        return MistralForSequenceClassification(MistralConfig(**SHAPE, sliding_window=4))
    model = LlamaForSequenceClassification(LlamaConfig(**SHAPE))
    if kind == "adapter":
        settings = LoraConfig(
            r=4, target_modules="all-linear", modules_to_save=["score"], task_type="SEQ_CLS"
        )
        model = get_peft_model(model, settings)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name or "modules_to_save" in name:
                    parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("kind", ["llama", "mistral", "adapter"])
def test_batched_rewards_equal_single_ones_and_those_of_transformers(kind):
    # In float64 a difference is a mistake and not rounding.
    model, rows = classifier(kind).double(), sequences()
    scorer = RewardScorer(model, Padding())
    single = [scorer.score([row])[0] for row in rows]
    for batch_size in (2, 5, 100):
        assert scorer.score(rows, batch_size) == pytest.approx(single, abs=1e-6)
    model.eval()
    with torch.no_grad():
        expected = [model(torch.tensor([row])).logits.item() for row in rows]
    assert single == pytest.approx(expected, abs=1e-6)
    assert len(set(single)) == len(rows)


def test_a_sequence_that_ends_in_the_pad_token_is_read_at_its_end():
    model = classifier("llama").eval()
    scorer = RewardScorer(model, Padding())
    ends_in_pad, longer = [7, 8, 9, 5], [7, 8, 9, 5, 6, 11]
    with torch.no_grad():
        hidden = model.model(torch.tensor([ends_in_pad])).last_hidden_state
        expected = model.score(hidden[:, -1]).item()
        # transformers looks for the last id that is not the pad token, and finds the one before.
        assert model(torch.tensor([ends_in_pad])).logits.item() != pytest.approx(expected)
    assert scorer.score([ends_in_pad, longer])[0] == pytest.approx(expected, abs=1e-6)


def test_an_encoder_pools_in_its_own_way():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=48, num_labels=1, pad_token_id=5, initializer_range=0.3,
    )  # fmt: skip
    scorer = RewardScorer(BertForSequenceClassification(config), Padding())
    rows = sequences(6)
    single = [scorer.score([row])[0] for row in rows]
    assert scorer.score(rows, 3) == pytest.approx(single, abs=1e-5)


def test_the_head_is_computed_in_its_own_precision():
    model = classifier("llama").bfloat16()
    model.score.float()
    values = RewardScorer(model, Padding()).score(sequences())
    rounded = torch.tensor(values).bfloat16().float().tolist()
    assert values != rounded


def test_scoring_leaves_the_mode_alone_and_refuses_empty_sequences():
    model = classifier("llama").train()
    scorer = RewardScorer(model, Padding())
    assert scorer.score([]) == []
    assert model.training
    with pytest.raises(AlignError, match="without tokens"):
        scorer.score([[7], []])


def test_batches_hold_every_place_once_the_longest_first():
    lengths = [3, 9, 1, 4, 9]
    batches = list(by_length(lengths, 2))
    assert sorted(place for batch in batches for place in batch) == list(range(5))
    flat = [lengths[place] for batch in batches for place in batch]
    assert flat == sorted(lengths, reverse=True)


def pairs() -> tuple[list[list[int]], list[list[int]]]:
    rows = sequences(14)
    return rows[:7], rows[7:]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_equal_those_of_one_forward_pass(temperature):
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    prompts, completions = pairs()
    found = token_logprobs(model, prompts, completions, batch_size=3, temperature=temperature)
    for prompt, completion, values in zip(prompts, completions, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0] / temperature
        logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        expected = logprobs[range(len(completion)), completion]
        assert values == pytest.approx(expected.tolist(), abs=1e-5)
    sums = sequence_logprobs(model, prompts, completions, temperature=temperature)
    assert sums == pytest.approx([sum(row) for row in found], abs=1e-4)


def test_log_probabilities_do_not_depend_on_how_much_fits(monkeypatch):
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    prompts, completions = pairs()
    whole = sequence_logprobs(model, prompts, completions)
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 1)
    assert sequence_logprobs(model, prompts, completions) == pytest.approx(whole, abs=1e-5)


def test_an_empty_completion_has_no_log_probabilities():
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    found = token_logprobs(model, [[7, 8], [9]], [[], [10, 11]])
    assert found[0] == []
    assert len(found[1]) == 2
    assert token_logprobs(model, [], []) == []
