"""What `align inspect` shows is what the stage trains on."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data.inspection import coloured, inspect_stage, packed_sequences
from align.data.rendering import training_rows
from align.errors import AlignError
from align.stages.dpo import DPOConfig
from align.stages.evaluate import EvalConfig
from align.stages.reward import RewardConfig
from align.stages.sample import SampleConfig
from align.stages.sft import SFTConfig

U = {"role": "user", "content": "how many\nships?"}
A = {"role": "assistant", "content": "two ships"}
B = {"role": "assistant", "content": "no ships at all"}
CHAT = {"messages": [U, A]}
PAIR = {"prompt": [U], "chosen": [A], "rejected": [B]}


@pytest.fixture(scope="module")
def base(bpe, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("base")
    bpe.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def config(base, write):
    """A function: stage config class, rows, keys -> config."""

    def make(kind, rows, **data):
        section = {"dataset_name": write(rows), "max_length": 128, **data}
        model = {"model_name_or_path": base}
        more = {"scorer": {"judge": "number"}} if kind is SampleConfig else {}
        if kind is EvalConfig:
            return EvalConfig(output_dir="out", models={"base": base}, data=section)
        return kind(output_dir="out", model=model, data=section, **more)

    return make


def lines(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_json_is_one_object_a_row(config, bpe, capsys):
    sft = config(SFTConfig, [CHAT] * 5)
    inspect_stage(sft, rows=2, as_json=True)
    found = lines(capsys)
    expected = training_rows(sft.data, bpe, "sft").train[0]
    mask = [int(label != -100) for label in expected["labels"]]
    assert found == [{"ids": expected["input_ids"], "loss_mask": mask}] * 2


@pytest.mark.parametrize("kind", [DPOConfig, RewardConfig])
def test_json_is_two_objects_a_pair(config, bpe, capsys, kind):
    stage = config(kind, [PAIR, PAIR])
    inspect_stage(stage, rows=1, as_json=True)
    found = lines(capsys)
    whole = training_rows(stage.data, bpe, "reward").train[0]
    assert [(line["row"], line["side"]) for line in found] == [(1, "chosen"), (1, "rejected")]
    assert [line["ids"] for line in found] == [whole["chosen_ids"], whole["rejected_ids"]]
    answers = [
        bpe.decode([i for i, on in zip(line["ids"], line["loss_mask"], strict=True) if on])
        for line in found
    ]
    assert answers == ["two ships<|eot_id|>", "no ships at all<|eot_id|>"]


@pytest.mark.parametrize("kind", [SampleConfig, EvalConfig])
def test_prompts_have_no_token_in_the_loss(config, capsys, kind):
    inspect_stage(config(kind, [{"prompt": [U]}]), as_json=True)
    (found,) = lines(capsys)
    assert set(found["loss_mask"]) == {0}


def test_every_token_is_shown_with_its_place_in_the_loss(config, capsys):
    inspect_stage(config(SFTConfig, [CHAT, CHAT]), rows=1)
    shown = capsys.readouterr().out
    assert "2 rows of chats in messages" in shown
    assert "100.0% of the rows end with an end-of-turn token" in shown
    assert (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>⏎\n⏎\nhow many⏎\nships?" in shown
    )
    assert "⟦two ships<|eot_id|>⟧" in shown
    assert "row 2" not in shown


def test_a_turn_marked_as_not_learned_is_shown_outside_the_loss(config, bpe, capsys):
    row = {"messages": [U, B | {"weight": 0}, U, A | {"weight": 1}]}
    inspect_stage(config(SFTConfig, [row, CHAT]), rows=1)
    shown = capsys.readouterr().out
    assert "no ships at all<|eot_id|>" in shown
    assert "⟦two ships<|eot_id|>⟧" in shown
    assert shown.count("⟦") == 1
    assert "1 row with answers that are marked as not learned" in shown
    inspect_stage(config(SFTConfig, [row]), as_json=True)
    (found,) = lines(capsys)
    on = [token for token, mask in zip(found["ids"], found["loss_mask"], strict=True) if mask]
    assert bpe.decode(on) == "two ships<|eot_id|>"


@pytest.mark.parametrize("kind", [SFTConfig, DPOConfig, RewardConfig, SampleConfig, EvalConfig])
def test_tools_are_shown_or_refused_by_every_stage(config, capsys, kind):
    call = {"name": "count", "arguments": {"of": "ships"}}
    asks = {"role": "assistant", "content": "", "tool_calls": [call]}
    row = {"prompt": [U], "chosen": [asks], "rejected": [A]}
    row = {"messages": [U, asks]} if kind is SFTConfig else row
    row |= {"tools": [{"type": "function", "function": {"name": "count", "parameters": {}}}]}
    made = config(kind, [row], max_length=None)
    with pytest.raises(AlignError, match="does not read them"):
        inspect_stage(made)
    if kind is EvalConfig:  # its models bring their own templates
        return
    model = made.model.model_copy(update={"chat_template_path": "llama3.1"})
    inspect_stage(made.model_copy(update={"model": model}))
    shown = capsys.readouterr().out
    assert '"name": "count", "parameters": {}}' in shown
    called = '{"type": "function", "name": "count", "parameters": {"of": "ships"}}<|eot_id|>⟧'
    assert (called in shown) == (kind is not SampleConfig)


def test_what_was_cut_is_told(config, capsys):
    long = {"messages": [U, {"role": "assistant", "content": "two ships " * 40}]}
    inspect_stage(config(SFTConfig, [CHAT, long], max_length=40))
    assert "1 row cut at the end: longer than max_length (40)" in capsys.readouterr().out


def test_packed_sequences_are_counted(config, capsys):
    inspect_stage(config(SFTConfig, [CHAT] * 10, packing=True, max_length=128))
    assert "packed into" in capsys.readouterr().out


def test_colours_tell_loss_from_prompt_and_control_from_text(bpe):
    ids = bpe("<|eot_id|>ships two", add_special_tokens=False).input_ids
    text = coloured(bpe, ids, [0] + [1] * (len(ids) - 1))
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert "green" not in styles["<|eot_id|>"]
    assert "cyan" in styles["<|eot_id|>"]
    assert all("green" in style for piece, style in styles.items() if piece != "<|eot_id|>")


def test_nothing_in_a_row_steers_the_terminal(config, capsys):
    evil = {"role": "user", "content": "\x1b[2J\x1b]52;c;AAAA\x07 [bold]x[/foo] \u202e"}
    inspect_stage(config(SFTConfig, [{"messages": [evil, A]}]))
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert "[bold]x[/foo]" in shown


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc", "Cf", "Zl", "Zp"]), max_size=12))
def test_characters_of_several_tokens_are_whole(bpe, text):
    ids = bpe(text, add_special_tokens=False).input_ids
    assert coloured(bpe, ids, [0] * len(ids)).plain == text


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=40))
def test_packing_counts_are_those_of_trl(lengths):
    from datasets import Dataset
    from trl import pack_dataset

    rows = Dataset.from_dict({"input_ids": [[0] * length for length in lengths]})
    assert packed_sequences(lengths, 50) == len(pack_dataset(rows, 50, strategy="bfd"))
