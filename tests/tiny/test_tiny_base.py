"""The shipped base: format, control tokens, chat template, size. No test trains a model."""

from __future__ import annotations

import json
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from align.tiny.corpus import documents
from align.tiny.exam import exam_questions, mark_questions

BASE = Path(__file__).parents[2] / "recipes" / "tiny" / "base"
CHAT = [
    {"role": "user", "content": " Who rules it? "},
    {"role": "assistant", "content": " Hilm rules it. "},
    {"role": "user", "content": "What is 12 plus 3?"},
    {"role": "assistant", "content": "15"},
]


@cache
def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BASE)


def test_the_architecture_is_a_small_llama() -> None:
    config = AutoConfig.from_pretrained(BASE)
    assert config.model_type == "llama"
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert config.tie_word_embeddings
    assert config.max_position_embeddings == 512
    assert config.vocab_size == len(_tokenizer())
    assert (BASE / "model.safetensors").stat().st_size < 8_000_000


def test_control_tokens() -> None:
    tokenizer = _tokenizer()
    assert tokenizer.bos_token == "<|begin_of_text|>"
    assert tokenizer.eos_token == "<|end_of_text|>"
    assert tokenizer.pad_token == "<|finetune_right_pad_id|>"
    for token in ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"):
        assert tokenizer(token, add_special_tokens=False)["input_ids"] == [
            tokenizer.convert_tokens_to_ids(token)
        ]
        assert token in tokenizer.all_special_tokens


def test_the_base_ends_with_the_end_of_text_only() -> None:
    generation = json.loads((BASE / "generation_config.json").read_text(encoding="utf-8"))
    tokenizer = _tokenizer()
    assert generation["eos_token_id"] == tokenizer.eos_token_id
    assert generation["pad_token_id"] == tokenizer.pad_token_id


def test_the_chat_format_is_that_of_llama_3() -> None:
    text = _tokenizer().apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWho rules it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


@pytest.mark.parametrize("turns", [2, 4])
def test_assistant_masks_cover_the_answers_and_their_ends(turns: int) -> None:
    tokenizer = _tokenizer()
    encoded = tokenizer.apply_chat_template(
        CHAT[:turns], return_dict=True, return_assistant_tokens_mask=True
    )
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    written = tokenizer.decode([token for token, mask in pairs if mask])
    assert written == "".join(f"{m['content'].strip()}<|eot_id|>" for m in CHAT[1:turns:2])
    assert encoded["input_ids"].count(tokenizer.bos_token_id) == 1


def test_a_prompt_is_a_prefix_of_its_conversation() -> None:
    tokenizer = _tokenizer()
    prompt = tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template(CHAT[:2])["input_ids"]
    assert whole[: len(prompt)] == prompt


def test_any_text_round_trips_and_digits_stand_alone() -> None:
    tokenizer = _tokenizer()
    for text in ("Zürich, 東京 – 3.14!\n\n\tend", *islice(documents(9), 50)):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert len(tokenizer("2026", add_special_tokens=False)["input_ids"]) == 4


def test_exam_answers_are_checked() -> None:
    questions = exam_questions("test", 100, 0)
    assert not any(question.item.task == "unsafe" for question in questions)
    for question in questions:
        if question.form == "quiz":
            assert question.passed(f" Sure! {question.item.full} Question: How?")
            assert question.passed(f" {question.item.bare}\n")
        assert not question.passed(" nothing of the kind")
    marks = mark_questions("test", 100, 0)
    assert {mark.mark for mark in marks} == {"right", "wrong"}
    assert all(mark.text.endswith("Mark:") for mark in marks)
