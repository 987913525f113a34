"""Marks of what is learned: a turn that is marked out is context, and nothing else changes."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from learned import learned

from align.config.sections import DataSection
from align.data.exact import MARKS
from align.data.rendering import training_rows
from align.data.sequences import Renderer, render_messages
from align.errors import AlignError

U = {"role": "user", "content": "How many ships?"}
A = {"role": "assistant", "content": "two ships"}
B = {"role": "assistant", "content": "none at all"}
FAMILIES = ["llama3", "chatml", "mistral", "gemma", "phi3"]


def marked(key: str, first, second) -> dict:
    turns = [U, A, U, B]
    return {
        "messages": [
            turn | ({} if mark is ... else {key: mark})
            for turn, mark in zip(turns, [..., first, ..., second], strict=True)
        ]
    }


@pytest.mark.parametrize("key", MARKS)
@pytest.mark.parametrize(("off", "on"), [(0, 1), (False, True), (0.0, 1.0)])
def test_a_turn_marked_out_is_context(render, bpe, key, off, on):
    plain = render([marked(key, ..., ...)]).train[0]
    cases = {
        (off, on): "none at all<|eot_id|>",
        (on, off): "two ships<|eot_id|>",
        (off, ...): "none at all<|eot_id|>",
        (..., off): "two ships<|eot_id|>",
        (on, on): "two ships<|eot_id|>none at all<|eot_id|>",
        (None, ...): "two ships<|eot_id|>none at all<|eot_id|>",
    }
    rows = render([marked(key, *marks) for marks in cases])
    assert [learned(bpe, row) for row in rows.train] == list(cases.values())
    assert all(row["input_ids"] == plain["input_ids"] for row in rows.train)
    assert rows.stats.muted == 4
    assert "4 rows with answers that are marked as not learned" in " ".join(rows.notes)
    assert rows.stats.ended_share == 1.0


def test_the_spelling_of_sharegpt(render, bpe):
    row = {
        "conversations": [
            {"from": "human", "value": "hi", "train": False},
            {"from": "gpt", "value": "two ships", "train": False},
            {"from": "human", "value": "hi", "train": False},
            {"from": "gpt", "value": "none", "train": True},
        ]
    }
    assert learned(bpe, render([row]).train[0]) == "none<|eot_id|>"


def test_spellings_mix_in_a_file(render, bpe):
    rows = [marked("weight", 0, 1), marked("train", False, True), marked("weight", False, True)]
    plain = {"messages": [U, A]}
    made = render([*rows, plain]).train
    assert [learned(bpe, row) for row in made] == ["none at all<|eot_id|>"] * 3 + [
        "two ships<|eot_id|>"
    ]


def test_parquet_with_none_where_a_mark_was_not(render, bpe, tmp_path):
    rows = [marked("weight", 0, 1), {"messages": [U | {"weight": None, "train": None}, A]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    made = render(str(tmp_path / "rows.parquet")).train
    assert [learned(bpe, row) for row in made] == ["none at all<|eot_id|>", "two ships<|eot_id|>"]
    floats = [{"messages": [U, A | {"weight": 0.0}, U, B | {"weight": 1.0}]}]
    pq.write_table(pa.Table.from_pylist(floats), tmp_path / "floats.parquet")
    assert (
        learned(bpe, render(str(tmp_path / "floats.parquet")).train[0]) == "none at all<|eot_id|>"
    )


def test_a_row_all_of_whose_answers_are_marked_out_is_a_row_without_labels(render):
    rows = render([marked("weight", 0, 0), marked("weight", 0, 1)])
    assert (len(rows.train), rows.stats.no_loss) == (1, 1)
    assert "1 row left out: no token in the loss" in rows.notes
    with pytest.raises(AlignError, match="no row is left to use"):
        render([marked("weight", 0, 0)])


BAD = [
    ({"weight": 0.5}, "`weight` of message 2 of `messages` is 0.5, and not 0, 1, true or false"),
    ({"weight": 2}, "`weight` of message 2 of `messages` is 2"),
    ({"weight": -1}, "is -1"),
    ({"train": "true"}, "`train` of message 2 of `messages` is 'true'"),
    ({"train": "no"}, "is 'no'"),
    ({"loss": [1]}, "`loss` of message 2 of `messages` is a list"),
    ({"weight": 0, "train": True}, "contradicts itself: `weight` is 0 and `train` is 1"),
    (
        {"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]},
        "message 2 of `messages` marks parts of itself (`train_detail`)",
    ),
]


@pytest.mark.parametrize(("mark", "message"), BAD)
@pytest.mark.parametrize("kind", ["sft", "prompts"])
def test_other_marks_are_an_error_with_the_row(render, mark, message, kind):
    good = marked("weight", 0, 1)
    with pytest.raises(AlignError) as caught:
        render([good, good, {"messages": [U, A | mark, U, B]}], kind)
    (problem,) = caught.value.problems
    assert message in problem.message
    assert problem.where.endswith("rows.jsonl row 3")


def test_marks_in_a_completion(render, bpe):
    row = {"prompt": [U, A, U], "completion": [A | {"weight": 0}, U, B]}
    assert learned(bpe, render([row]).train[0]) == "none at all<|eot_id|>"
    context = {"prompt": [U, A | {"weight": 0}, U], "completion": [B]}
    assert learned(bpe, render([context]).train[0]) == "none at all<|eot_id|>"


def test_the_answers_of_a_pair_are_compared_whole(render):
    pair = {"prompt": [U, A | {"weight": 0}, U], "chosen": [B], "rejected": [A]}
    for kind in ("dpo", "reward"):
        rows = render([pair], kind).train.to_list()
        bare = {**pair, "prompt": [U, A, U]}
        assert rows == render([bare], kind).train.to_list()
        with pytest.raises(
            AlignError, match="turn of the answer `chosen` is marked as not learned"
        ):
            render([pair | {"chosen": [B | {"weight": 0}]}], kind)
    implicit = {"chosen": [*pair["prompt"], B | {"weight": 1}], "rejected": [U, A, U, A]}
    assert render([implicit], "dpo").train.to_list() == render([pair], "dpo").train.to_list()
    same = {"prompt": [U], "chosen": [A | {"weight": 1}], "rejected": [A]}
    with pytest.raises(AlignError, match="are the same"):
        render([same], "dpo")
    ranked = {"prompt": [U], "ranking": [[B], [A | {"train": False}]]}
    with pytest.raises(AlignError, match="a turn of answer 2 of `ranking` is marked"):
        render([ranked], "dpo")


def test_prompts_are_the_same_with_marks_and_keep_them(render):
    """So the earlier answers stay context when a sampled answer becomes a demonstration."""
    made = render([marked("train", False, True)], "prompts").train[0]
    plain = render([marked("train", ..., ...)], "prompts").train[0]
    assert made["prompt_ids"] == plain["prompt_ids"]
    assert [turn["weight"] for turn in made["prompt"]] == [None, 0, None]


def test_whole_chats_in_the_loss_leave_out_what_is_marked(render, bpe):
    row = render([marked("weight", 0, 1)], options={"assistant_only": False}).train[0]
    whole = render([marked("weight", ..., 1)], options={"assistant_only": False}).train[0]
    assert learned(bpe, whole) == bpe.decode(whole["input_ids"])
    assert learned(bpe, row) == learned(bpe, whole).replace("two ships<|eot_id|>", "")
    with pytest.raises(AlignError, match="message 1 is marked as not learned") as caught:
        render([{"messages": [U | {"weight": 0}, A]}], options={"assistant_only": False})
    assert "assistant_only_loss: true" in caught.value.problems[0].hint


def test_turns_of_others_that_are_marked_to_be_learned_are_told(render, bpe):
    rows = render([{"messages": [U | {"train": True}, A | {"train": True}]}, {"messages": [U, A]}])
    assert learned(bpe, rows.train[0]) == learned(bpe, rows.train[1])
    assert rows.stats.foreign == 1
    assert "1 row with turns of others than the assistant marked" in " ".join(rows.notes)


contents = st.text(st.sampled_from("ab \n<|é"), min_size=1, max_size=10) | st.sampled_from(
    ["<|eot_id|>", "two ships", "</s>", "<|im_end|>", "[INST]"]
)
pairs = st.lists(
    st.tuples(contents, contents, st.sampled_from([0, 1, None])), min_size=1, max_size=4
)


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=40)
@given(pairs=pairs)
def test_marks_change_the_mask_and_never_the_ids(families, family, pairs):
    """The mask with marks is the mask without, zero inside the turns that are marked out."""
    tokenizer = families[family]
    chat, plain = [], []
    for asked, answered, weight in pairs:
        turns = [("user", asked, None), ("assistant", answered, weight)]
        plain += [{"role": role, "content": content} for role, content, _ in turns]
        chat += [
            {"role": role, "content": content} | ({} if mark is None else {"weight": mark})
            for role, content, mark in turns
        ]
    with_marks, without = (Renderer(tokenizer).chats([turns])[0] for turns in (chat, plain))
    assert with_marks.input_ids == without.input_ids
    alone = [
        render_messages(tokenizer, [t | ({"weight": int(n == place)}) for n, t in enumerate(plain)])
        for place in range(1, len(plain), 2)
    ]
    expected = [0] * len(without.loss_mask)
    for row, (_, _, weight) in zip(alone, pairs, strict=True):
        if weight != 0:
            expected = [a | b for a, b in zip(expected, row.loss_mask, strict=True)]
    assert with_marks.loss_mask == expected
    every = [sum(column) for column in zip(*(row.loss_mask for row in alone), strict=True)]
    assert every == without.loss_mask  # each token in the loss belongs to one turn


@settings(deadline=None, max_examples=25)
@given(
    marks=st.lists(
        st.tuples(st.sampled_from(MARKS), st.sampled_from([0, 1, True, False, None])),
        min_size=1,
        max_size=6,
    )
)
def test_marks_of_any_spelling_in_one_file(bpe, tmp_path_factory, marks):
    file = tmp_path_factory.mktemp("marks") / "rows.jsonl"
    rows = [{"messages": [U, A | {key: value}, U, B]} for key, value in marks]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    made = training_rows(DataSection(dataset_name=str(file)), bpe, "sft").train
    off, on = "none at all<|eot_id|>", "two ships<|eot_id|>none at all<|eot_id|>"
    expected = [on if value is None or value else off for _, value in marks]
    assert [learned(bpe, row) for row in made] == expected
    assert len({tuple(ids) for ids in made["input_ids"]}) == 1
