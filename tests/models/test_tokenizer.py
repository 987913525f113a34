"""Pad tokens, ends of turns, chat templates and what they write."""

import json
import logging
from pathlib import Path

import pytest

from align.config.sections import ModelSection
from align.data.sequences import render_prompt
from align.errors import AlignError
from align.models.tokenizer import (
    chat_facts,
    control_token_ids,
    end_of_turn_ids,
    load_tokenizer,
    shipped_template,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]


def build(special: list[str], template: str | None = None, **named: str):
    """A byte-level tokenizer with these special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    made.chat_template = template
    return made


@pytest.fixture
def saved(tmp_path: Path):
    """Save a tokenizer made by `build` and return its folder."""

    def save(*arguments, name: str = "model", **named) -> str:
        build(*arguments, **named).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


def load(path: str, **more) -> object:
    return load_tokenizer(ModelSection(model_name_or_path=path, **more))


def test_a_base_with_llama3_tokens_gets_the_shipped_template_and_says_so(saved, caplog):
    path = saved(
        [*LLAMA3, "<|reserved_special_token_0|>"], bos_token=LLAMA3[0], eos_token=LLAMA3[1]
    )
    with caplog.at_level(logging.WARNING):
        tokenizer = load(path)
    assert "the shipped `llama3` template is used" in caplog.text
    assert tokenizer.decode(render_prompt(tokenizer, [{"role": "user", "content": " hi "}])) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert tokenizer.pad_token == "<|reserved_special_token_0|>"


def test_a_base_without_chat_tokens_has_no_template(saved):
    path = saved(["<s>", "</s>", "<unk>"], bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer = load(path)
    assert tokenizer.chat_template is None
    assert end_of_turn_ids(tokenizer) == [tokenizer.eos_token_id]
    with pytest.raises(AlignError, match="has no chat template"):
        control_token_ids(tokenizer)


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        (
            ["<|finetune_right_pad_id|>", "<|reserved_special_token_0|>"],
            "<|finetune_right_pad_id|>",
        ),
        (["<|reserved_special_token_0|>"], "<|reserved_special_token_0|>"),
        (["<|vision_pad|>", "<|reserved_special_token_0|>"], "<|vision_pad|>"),
    ],
)
@pytest.mark.parametrize("own", [None, LLAMA3[1], LLAMA3[4]])
def test_pad_ends_neither_a_turn_nor_a_text(saved, special, expected, own):
    named = {"pad_token": own} if own else {}
    path = saved([*LLAMA3, *special], bos_token=LLAMA3[0], eos_token=LLAMA3[1], **named)
    tokenizer = load(path)
    assert tokenizer.pad_token == expected
    assert tokenizer.pad_token_id not in end_of_turn_ids(tokenizer)


def test_a_sound_pad_token_is_kept(saved):
    path = saved([*LLAMA3, "<x>", "<pad>"], eos_token=LLAMA3[1], pad_token="<x>")
    assert load(path).pad_token == "<x>"


def test_the_unknown_token_pads_where_nothing_else_is_spare(saved):
    path = saved(["<s>", "</s>", "<unk>"], bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    assert load(path).pad_token == "<unk>"


def test_a_tokenizer_with_nothing_to_pad_with_is_refused(saved):
    end = "<|endoftext|>"
    path = saved([end], bos_token=end, eos_token=end, unk_token=end)
    with pytest.raises(AlignError, match="no token to pad with") as caught:
        load(path)
    assert "tokenizer_name_or_path" in caught.value.problems[0].hint


def test_a_turn_ends_on_the_token_behind_an_answer(saved):
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|pad|>"]
    tokenizer = load(saved(special, CHATML, eos_token="<|endoftext|>", pad_token="<|pad|>"))
    tokens = tokenizer.convert_ids_to_tokens(end_of_turn_ids(tokenizer))
    assert tokens == ["<|im_end|>", "<|endoftext|>"]
    written = tokenizer.convert_ids_to_tokens(control_token_ids(tokenizer))
    assert sorted(written) == ["<|im_end|>", "<|im_start|>"]


def test_the_end_is_found_behind_a_default_system_turn(saved):
    template = "<|im_start|>system\nBe kind.<|im_end|>\n" + CHATML
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|pad|>"]
    tokenizer = load(saved(special, template, eos_token="<|endoftext|>", pad_token="<|pad|>"))
    assert chat_facts(tokenizer).turn_ends == ("<|im_end|>",)


def test_answers_inside_a_chat_may_end_otherwise(saved):
    template = (
        "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
        "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    )
    special = ["<|start|>", "<|message|>", "<|return|>", "<|end|>", "<|eos|>", "<|pad|>"]
    tokenizer = load(saved(special, template, eos_token="<|eos|>", pad_token="<|pad|>"))
    assert chat_facts(tokenizer).turn_ends == ("<|return|>", "<|end|>")


def test_the_next_header_is_no_end_of_a_turn(saved):
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{# #}"
    special = ["<|user|>", "<|assistant|>", "<|eos|>", "<|pad|>"]
    tokenizer = load(saved(special, template, eos_token="<|eos|>", pad_token="<|pad|>"))
    assert chat_facts(tokenizer).turn_ends == ()
    assert end_of_turn_ids(tokenizer) == [tokenizer.eos_token_id]


def test_llama31_turns_also_end_on_the_token_that_waits_for_a_tool(saved):
    special = [*LLAMA3, "<|eom_id|>", "<|finetune_right_pad_id|>"]
    tokenizer = load(saved(special, shipped_template("llama3"), eos_token="<|end_of_text|>"))
    tokens = tokenizer.convert_ids_to_tokens(end_of_turn_ids(tokenizer))
    assert tokens == ["<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"]


def test_a_template_can_be_a_file_or_a_shipped_name(saved, tmp_path):
    special = [*LLAMA3, "<|im_start|>", "<|im_end|>", "<|pad|>"]
    path = saved(special, eos_token="<|end_of_text|>", pad_token="<|pad|>")
    (tmp_path / "own.jinja").write_text(CHATML, encoding="utf-8")
    assert load(path, chat_template_path=str(tmp_path / "own.jinja")).chat_template == CHATML
    assert load(path, chat_template=CHATML).chat_template == CHATML
    shipped = load(path, chat_template_path="llama3").chat_template
    assert shipped == shipped_template("llama3")


@pytest.mark.parametrize(
    ("special", "template", "message"),
    [
        (LLAMA3, "nowhere.jinja", "no such file"),
        (["</s>"], "llama3", r"writes .*<\|eot_id\|>, and the tokenizer has no such token"),
    ],
)
def test_a_template_that_does_not_fit_is_refused(saved, special, template, message):
    path = saved([*special, "<pad>"], eos_token=special[0], pad_token="<pad>")
    with pytest.raises(AlignError, match=message):
        load(path, chat_template_path=template)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.content | nothing }}{% endfor %}", "cannot render"),
        ("{% if messages %}{{ raise_exception('out of order') }}{% endif %}", "out of order"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "generation %} markers"),
        (
            "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}",
            "do not hold just the answers",
        ),
    ],
)
def test_a_broken_template_is_refused_with_its_reason(saved, template, message):
    path = saved(["</s>", "<pad>"], template, eos_token="</s>", pad_token="<pad>")
    with pytest.raises(AlignError, match=message):
        load(path)


def test_the_adapter_folder_gives_the_tokenizer_where_it_holds_one(saved, tmp_path):
    base = saved([*LLAMA3, "<pad>"], eos_token=LLAMA3[1], pad_token="<pad>")
    adapter = saved([*LLAMA3, "<more>", "<pad>"], eos_token=LLAMA3[1], name="adapter")
    loaded = load_tokenizer(ModelSection(model_name_or_path=base, adapter_name_or_path=adapter))
    assert "<more>" in loaded.get_vocab()
    (tmp_path / "bare").mkdir()
    bare = ModelSection(model_name_or_path=base, adapter_name_or_path=str(tmp_path / "bare"))
    assert "<more>" not in load_tokenizer(bare).get_vocab()


def test_an_adapter_without_a_tokenizer_leads_to_its_base(saved, tmp_path):
    base = saved([*LLAMA3, "<pad>"], eos_token=LLAMA3[1], pad_token="<pad>")
    config = {"base_model_name_or_path": base, "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    assert load(str(tmp_path / "adapter")).pad_token == "<pad>"


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "a/b/c"])
def test_a_missing_folder_is_named(name):
    with pytest.raises(AlignError, match="no such folder"):
        load(name)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(AlignError, match="holds no tokenizer"):
        load(str(tmp_path))
