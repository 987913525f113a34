"""Sampling in slots: equal to `generate`, whatever the batch, and distributed as the model says."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from align.errors import AlignError
from align.generation.sampler import Completion, has_attention_caches, sample_completions
from align.generation.slots import HEADROOM

VOCABULARY = 40
STOPS = [1, 4, 17]
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 5,
}


def made(kind: str, seed: int = 0):
    torch.manual_seed(seed)
    models = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=6)),
        "qwen": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16)),
        "mamba": lambda: MambaForCausalLM(
            MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4)
        ),
    }
    return models[kind]().eval()


def prompts(count: int = 9, longest: int = 12, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [
        torch.randint(6, VOCABULARY, (length,), generator=generator).tolist() for length in lengths
    ]


def sample(model, asked, **options) -> list[list[Completion]]:
    defaults = {"max_new_tokens": 20, "stop_ids": STOPS, "pad_id": 5, "batch_size": 8, "seed": 3}
    return sample_completions(model, asked, **(defaults | options))


def generated(model, asked: list[list[int]], steps: int) -> list[list[int]]:
    """Greedy tokens by transformers, one prompt at a time, up to and with the stop token."""
    rows = []
    for prompt in asked:
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=steps,
            eos_token_id=STOPS,
            pad_token_id=5,
        )
        rows.append(output[0, len(prompt) :].tolist())
    return rows


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen", "mamba"])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_greedy_equals_generate_in_padded_batches(kind, batch_size):
    model, asked = made(kind), prompts()
    found = sample(model, asked, temperature=0, batch_size=batch_size, max_new_tokens=24)
    assert [row[0].all_ids for row in found] == generated(model, asked, 24)


def test_greedy_equals_generate_beyond_the_headroom():
    # Some rows stop early and others go on, so slots are reused and columns are moved.
    model, asked = made("llama", seed=5), prompts(count=14, longest=30)
    found = sample(
        model, asked, temperature=0, batch_size=5, max_new_tokens=3 * HEADROOM, stop_ids=STOPS
    )
    assert [row[0].all_ids for row in found] == generated(model, asked, 3 * HEADROOM)
    assert max(len(row[0].ids) for row in found) > HEADROOM
    assert min(len(row[0].ids) for row in found) < HEADROOM


@pytest.mark.parametrize("kind", ["llama", "mistral", "mamba"])
def test_texts_do_not_depend_on_the_batch(kind):
    model, asked = made(kind), prompts(count=6)
    whole = sample(model, asked, num_generations=3, batch_size=64)
    for batch_size in (2, 7):
        assert sample(model, asked, num_generations=3, batch_size=batch_size) == whole


def test_texts_do_not_depend_on_the_other_prompts_or_samples():
    model, asked = made("llama"), prompts()
    whole = sample(model, asked, num_generations=4)
    part = sample(model, [asked[6], asked[2]], num_generations=2, indices=[6, 2])
    assert part == [whole[6][:2], whole[2][:2]]
    longer = sample(model, asked, num_generations=4, max_new_tokens=30)
    for short_row, long_row in zip(whole, longer, strict=True):
        for short, long in zip(short_row, long_row, strict=True):
            assert long == short if short.ended else long.ids[:20] == short.ids


def test_another_seed_and_another_index_give_other_texts():
    model, asked = made("llama"), prompts()
    one = sample(model, asked, seed=0)
    assert sample(model, asked, seed=1) != one
    assert sample(model, asked, seed=0, indices=range(100, 100 + len(asked))) != one
    assert sample(model, asked, seed=0) == one


def test_both_ways_of_writing_draw_the_same(monkeypatch):
    model, asked = made("llama"), prompts()
    options = {"num_generations": 3, "temperature": 0.8, "top_p": 0.9, "top_k": 20}
    slots = sample(model, asked, **options)
    monkeypatch.setattr("align.generation.sampler.has_attention_caches", lambda _: False)
    assert sample(model, asked, **options) == slots


def test_which_models_have_caches_that_can_be_copied():
    assert has_attention_caches(made("llama"))
    assert has_attention_caches(made("mistral"))
    assert not has_attention_caches(made("mamba"))


def test_first_tokens_are_distributed_as_the_model_says():
    model = made("llama", seed=2)
    prompt = [7, 20, 33]
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    draws = 4000
    rows = sample(model, [prompt], num_generations=draws, max_new_tokens=1, batch_size=512)[0]
    counts = torch.bincount(torch.tensor([row.all_ids[0] for row in rows]), minlength=VOCABULARY)
    likely = expected * draws >= 5
    seen = torch.cat([counts[likely], counts[~likely].sum()[None]])
    awaited = torch.cat([expected[likely], expected[~likely].sum()[None]]) * draws
    chi_square = float(((seen - awaited) ** 2 / awaited).sum())
    freedom = len(seen) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5  # four deviations


def test_second_tokens_follow_their_own_first_token():
    model = made("llama", seed=2)
    prompt = [7, 20, 33]
    rows = sample(model, [prompt], num_generations=3000, max_new_tokens=2, batch_size=512)[0]
    first = Counter(row.ids[0] for row in rows if row.ids).most_common(1)[0][0]
    with torch.no_grad():
        expected = model(torch.tensor([[*prompt, first]])).logits[0, -1].softmax(-1)
    second = torch.tensor([row.all_ids[1] for row in rows if row.ids[:1] == [first]])
    shares = torch.bincount(second, minlength=VOCABULARY) / len(second)
    assert float((shares - expected).abs().sum() / 2) < 3 * (VOCABULARY / len(second)) ** 0.5 / 2


def test_every_stop_token_ends_a_completion_and_is_left_out_of_its_ids():
    model = made("llama")
    rows = sample(model, prompts(), num_generations=40, max_new_tokens=30, batch_size=64)
    completions = [completion for row in rows for completion in row]
    assert {c.stop_id for c in completions if c.ended} == set(STOPS)
    for completion in completions:
        assert not set(completion.ids) & set(STOPS)
        assert completion.ended == (completion.stop_id is not None)
        assert len(completion.ids) == 30 if not completion.ended else len(completion.ids) < 30
        assert completion.all_ids[: len(completion.ids)] == completion.ids


def test_a_completion_cut_at_the_limit_has_not_ended():
    row = sample(made("llama"), prompts(), stop_ids=[], max_new_tokens=5)
    assert all(not c.ended and c.stop_id is None and len(c.ids) == 5 for (c,) in row)


def test_more_samples_than_the_batch_holds():
    model, asked = made("llama"), prompts(count=3)
    few = sample(model, asked, num_generations=11, batch_size=4)
    assert few == sample(model, asked, num_generations=11, batch_size=100)
    assert [len(row) for row in few] == [11, 11, 11]


def test_greedy_samples_of_a_prompt_are_one_computed_once():
    row = sample(made("llama"), prompts(count=1), num_generations=3, temperature=0)[0]
    assert row == [row[0]] * 3


def test_an_adapter_takes_part_and_modes_are_put_back():
    base = made("llama")
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    model.train()
    base.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    asked = prompts()
    found = sample(model, asked, temperature=0)
    assert [module.training for module in model.modules()] == modes
    with model.disable_adapter():
        assert sample(model, asked, temperature=0) != found
    merged = model.eval().merge_and_unload()
    assert [row[0].all_ids for row in found] == generated(merged, asked, 20)


def test_modes_are_put_back_after_an_error():
    model = made("llama").train()
    with pytest.raises(IndexError):
        sample(model, [[VOCABULARY + 1]])
    assert model.training
    assert not torch.is_inference_mode_enabled()


def test_the_checkpoints_own_generation_settings_have_no_say(monkeypatch):
    model, asked = made("llama"), prompts()
    plain = sample(model, asked)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.no_repeat_ngram_size = 1
    assert sample(model, asked) == plain
    monkeypatch.setattr("align.generation.sampler.has_attention_caches", lambda _: False)
    kept = model.generation_config
    assert sample(model, asked) == plain
    assert model.generation_config is kept


def test_half_precision_and_odd_head_sizes():
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_key_value_heads": 1})).bfloat16().eval()
    rows = sample(model, prompts(), num_generations=2)
    assert all(len(row) == 2 for row in rows)


@pytest.mark.parametrize("slots", [True, False])
def test_a_broken_model_is_refused(slots, monkeypatch):
    model = made("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    monkeypatch.setattr("align.generation.sampler.has_attention_caches", lambda _: slots)
    with pytest.raises(AlignError, match="NaN"):
        sample(model, prompts())


def test_columns_behind_the_mask_are_clean(monkeypatch):
    """Fresh memory may hold anything, and a NaN in a value would pass through any mask."""
    model, asked = made("llama"), prompts()
    clean = sample(model, asked, num_generations=2)
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, shape: self.new_full(shape, torch.nan)
    )
    assert sample(model, asked, num_generations=2) == clean


def test_progress_is_told_in_steps_of_the_batch_and_at_the_end():
    told = []
    asked = prompts(count=5)
    rows = sample(
        made("llama"), asked, num_generations=3, on_batch=lambda *counts: told.append(counts)
    )
    tokens = sum(len(c.all_ids) for row in rows for c in row)
    assert [count for count, _ in told] == [8, 15]
    assert told[-1] == (15, tokens)


def test_nothing_asked_and_nothing_in_a_prompt():
    assert sample(made("llama"), []) == []
    with pytest.raises(AlignError, match=r"row 8: the prompt has no tokens"):
        sample(made("llama"), [[6], []], indices=[3, 7])


def test_padding_is_never_read():
    """What stands in the padded columns must not change a single logit's choice."""
    model, asked = made("llama"), prompts()
    one = sample(model, asked, num_generations=2, pad_id=5)
    assert sample(model, asked, num_generations=2, pad_id=39) == one


def test_completions_are_plain_data():
    completion = Completion([3, 4], True, 1)
    assert completion.all_ids == [3, 4, 1]
    assert replace(completion, ended=False, stop_id=None).all_ids == [3, 4]
