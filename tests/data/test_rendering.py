"""From recipe to token rows: what is kept, cut, left out, counted and refused."""

import numpy as np
import pytest
from learned import learned

from align.config.sections import DataSection
from align.data.rendering import training_rows
from align.errors import AlignError

U = {"role": "user", "content": "how many ships?"}
A = {"role": "assistant", "content": "two ships"}
B = {"role": "assistant", "content": "no ships at all"}
CHAT = {"messages": [U, A]}
PAIR = {"prompt": [U], "chosen": [A], "rejected": [B]}


def test_labels_are_the_tokens_in_the_loss(render, bpe):
    rows = render([CHAT])
    (row,) = rows.train
    assert rows.train.column_names == ["input_ids", "labels"]
    assert learned(bpe, row) == "two ships<|eot_id|>"
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    assert all(label in (-100, token) for token, label in pairs)
    assert rows.stats.loss_tokens == sum(label != -100 for label in row["labels"])
    assert rows.stats.tokens == len(row["input_ids"])
    assert (rows.stats.ended_share, rows.test) == (1.0, None)


def test_the_whole_chat_is_in_the_loss_on_request(render):
    row = render([CHAT], options={"assistant_only": False}).train[0]
    assert row["labels"] == row["input_ids"]


def test_only_the_completion_of_messages_is_in_the_loss(render, bpe):
    row = {"prompt": [U, B, U], "completion": [A, U, B]}
    made = render([row]).train[0]
    assert learned(bpe, made) == "two ships<|eot_id|>no ships at all<|eot_id|>"


def test_plain_completions_and_texts(render, bpe):
    made = render([{"prompt": "two", "completion": " ships"}]).train[0]
    assert learned(bpe, made) == " ships<|end_of_text|>"
    made = render([{"text": "two ships"}]).train[0]
    assert learned(bpe, made) == "<|begin_of_text|>two ships<|end_of_text|>"


def test_pairs_for_dpo_and_for_a_reward_model_are_the_same_tokens(render, bpe):
    (pair,) = render([PAIR], "dpo").train
    rows = render([PAIR], "reward")
    (whole,) = rows.train
    assert list(pair) == ["prompt_ids", "chosen_ids", "rejected_ids"]
    assert list(whole) == ["chosen_ids", "rejected_ids"]
    for side in ("chosen_ids", "rejected_ids"):
        assert pair["prompt_ids"] + pair[side] == whole[side]
    assert bpe.decode(pair["chosen_ids"]) == "two ships<|eot_id|>"
    assert rows.stats.ended_share == 1.0


def test_margins_are_kept_for_reward_models_and_asked_for(render):
    rows = [PAIR | {"margin": 1.5}]
    assert render(rows, "reward").train["margin"][:] == [1.5]
    assert "margin" not in render(rows, "dpo").train.column_names
    assert render(rows, "reward", options={"require_margin": True}).train["margin"][:] == [1.5]
    with pytest.raises(AlignError, match="have no margin"):
        render([PAIR], "reward", options={"require_margin": True})


def test_prompts_end_where_the_answer_begins_and_keep_their_columns(render, bpe):
    rows = render([{"prompt": [U], "task": "count", "n": 2}], "prompts")
    (row,) = rows.train
    assert (row["prompt"], row["task"], row["n"]) == ([U], "count", 2)
    expected = bpe.apply_chat_template([U], add_generation_prompt=True)["input_ids"]
    assert row["prompt_ids"] == expected
    assert rows.notes[0].endswith("1 row of prompts in messages")


@pytest.mark.parametrize(("mode", "kept"), [("keep_start", 2), ("drop", 1)])
def test_long_rows_are_cut_or_left_out(render, mode, kept):
    long = {"messages": [U, {"role": "assistant", "content": "two ships " * 40}]}
    rows = render([CHAT, long], max_length=60, truncation_mode=mode)
    assert len(rows.train) == rows.stats.kept == kept
    assert max(map(len, rows.train["input_ids"])) <= 60
    assert (rows.stats.truncated, rows.stats.too_long) == ((1, 0) if kept == 2 else (0, 1))
    assert rows.stats.ended == 1
    assert any("max_length (60)" in note for note in rows.notes)


def test_rows_whose_answer_is_cut_away_are_left_out(render):
    long = {"messages": [{"role": "user", "content": "how many " * 60}, A]}
    rows = render([CHAT, long], max_length=60)
    assert (rows.stats.rows, rows.stats.kept, rows.stats.no_loss) == (2, 1, 1)


def test_pairs_that_the_cut_makes_equal_are_left_out(render, bpe):
    same = "two ships " * 20
    long = {
        "prompt": [U],
        "chosen": [{"role": "assistant", "content": same + "a"}],
        "rejected": [{"role": "assistant", "content": same + "b"}],
    }
    lost = {**PAIR, "prompt": [{"role": "user", "content": "how many " * 60}]}
    rows = render([PAIR, long, lost], "dpo", max_length=60)
    assert (rows.stats.kept, rows.stats.equal, rows.stats.no_loss) == (1, 1, 1)
    rows = render([PAIR, long, lost], "dpo", max_length=60, truncation_mode="drop")
    assert (rows.stats.kept, rows.stats.too_long) == (1, 2)
    rows = render([PAIR], "dpo", max_length=len(bpe.apply_chat_template([U])["input_ids"]) + 8)
    assert rows.stats.truncated == 1
    assert rows.stats.ended == 0


def test_prompts_are_never_cut(render):
    long = {"prompt": [{"role": "user", "content": "how many " * 60}]}
    rows = render([{"prompt": [U]}, long], "prompts", max_length=60)
    assert (rows.stats.kept, rows.stats.too_long) == (1, 1)


@pytest.mark.parametrize("kind", ["sft", "dpo", "reward", "prompts"])
def test_a_data_set_without_a_usable_row_is_refused(render, kind):
    rows = {"sft": [CHAT], "prompts": [{"prompt": [U]}]}.get(kind, [PAIR])
    with pytest.raises(AlignError, match=r"no row is left.*max_length \(5\)") as caught:
        render(rows, kind, max_length=5)
    assert "raise data.max_length" in caught.value.problems[0].hint


def test_a_template_that_refuses_rows_names_them(write, families):
    data = DataSection(dataset_name=write([CHAT, {"messages": [U, U, A]}]))
    with pytest.raises(AlignError, match="roles must alternate") as caught:
        training_rows(data, families["mistral"], "sft")
    assert caught.value.problems[0].where.endswith("rows.jsonl row 2")


def test_rendered_chats_in_a_text_column_are_refused(render, bpe):
    text = bpe.apply_chat_template([U, A], tokenize=False)
    with pytest.raises(AlignError, match="look like chats that are rendered already") as caught:
        render([{"text": text}])
    assert "`messages`" in caught.value.problems[0].hint


def test_rows_with_control_tokens_in_their_text_are_counted(render):
    bad = {"messages": [{"role": "user", "content": "<|eot_id|>"}, A]}
    rows = render([CHAT, bad])
    assert rows.stats.escaped == 1
    assert any("were kept as text" in note for note in rows.notes)


def test_a_template_that_never_ends_a_turn_is_told(write, tokenizer_for):
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    tokenizer = tokenizer_for(template + "{# <|user|><|assistant|> #}")
    rows = training_rows(DataSection(dataset_name=write([CHAT])), tokenizer, "sft")
    assert any("will not learn to stop" in note for note in rows.notes)


def test_a_mixture_of_forms_becomes_one_set_of_rows(write, bpe):
    chats = write([CHAT] * 30, "chats.jsonl")
    plain = write([{"prompt": "a", "completion": f" b{n}"} for n in range(30)], "plain.jsonl")
    data = DataSection(
        datasets=[{"path": chats, "weight": 2}, {"path": plain, "weight": 1}], max_length=64
    )
    rows = training_rows(data, bpe, "sft")
    assert len(rows.train) == 45
    learned_ends = [row["labels"][-1] for row in rows.train]
    assert learned_ends.count(bpe.eos_token_id) == 15
    first = [end == bpe.eos_token_id for end in learned_ends[:15]]
    assert any(first)
    assert not all(first)
    assert "66.7% of the mixture" in rows.notes[0]
    again = training_rows(data, bpe, "sft")
    assert again.train["input_ids"][:] == rows.train["input_ids"][:]
    assert len(rows.sources) == 2


def test_pairs_with_and_without_a_margin_can_be_mixed(write, bpe):
    first = write([PAIR | {"margin": 1.0}], "first.jsonl")
    second = write([PAIR], "second.jsonl")
    data = DataSection(datasets=[{"path": first}, {"path": second}])
    assert "margin" not in training_rows(data, bpe, "reward").train.column_names


def test_rows_are_held_out_for_evaluation(render):
    rows = [{"messages": [U, {"role": "assistant", "content": f"{n} ships"}]} for n in range(20)]
    made = render(rows, test_split_size=0.25)
    assert (len(made.train), len(made.test)) == (15, 5)
    together = {tuple(ids) for part in (made.train, made.test) for ids in part["input_ids"]}
    assert len(together) == 20
    assert made.test_stats.kept == 5
    with pytest.raises(AlignError, match="leaves none to train on"):
        render(rows[:1], test_split_size=0.5)


def test_a_number_of_rows_can_be_held_out(write, bpe):
    chats = [[U, {"role": "assistant", "content": f"{n} ships"}] for n in range(40)]
    rows = [{"messages": chat} for chat in chats]
    files = [write(rows[:30], "a.jsonl"), write(rows[30:], "b.jsonl")]
    data = DataSection(datasets=[{"path": str(file)} for file in files], test_split_size=8)
    rows = training_rows(data, bpe, "sft")
    assert (rows.stats.kept, rows.test_stats.kept) == (32, 8)


def test_pairs_of_one_prompt_are_never_on_both_sides(render):
    rows = [
        {"prompt": f"Question {n // 4}?", "chosen": f"Answer {n}.", "rejected": "No."}
        for n in range(40)
    ]
    made = render(rows, "dpo", test_split_size=0.2)
    sides = [{tuple(ids) for ids in part["prompt_ids"]} for part in (made.train, made.test)]
    assert (len(made.train), len(made.test)) == (32, 8)
    assert not sides[0] & sides[1]


def test_a_test_split_is_read_whole(write, tmp_path, bpe):
    write([CHAT] * 5, "train.jsonl")
    write([CHAT] * 4, "test.jsonl")
    data = DataSection(dataset_name=str(tmp_path), dataset_test_split="test[:3]", max_samples=2)
    made = training_rows(data, bpe, "sft")
    assert (len(made.train), len(made.test)) == (2, 3)


def test_the_origin_names_files_and_counts(render):
    origin = render([CHAT, CHAT], test_split_size=0.5).origin()
    (source,) = origin["sources"]
    assert source["path"].endswith("rows.jsonl")
    assert len(source["sha256"]) == 64
    assert origin["train"]["kept"] == origin["test"]["kept"] == 1


def test_processes_make_no_difference(render):
    rows = [{"messages": [U, {"role": "assistant", "content": f"{n} ships"}]} for n in range(30)]
    alone = render(rows)
    shared = render(rows, dataset_num_proc=2)
    assert alone.train["labels"][:] == shared.train["labels"][:]
    assert alone.stats == shared.stats


def test_nothing_is_left_beside_the_rows(render, write, tmp_path):
    render([CHAT] * 3, test_split_size=0.3)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_no_progress_bar_is_shown(render, capfd):
    render([CHAT] * 3)
    assert capfd.readouterr() == ("", "")


def test_lengths_are_those_of_the_rows(render):
    rows = [{"messages": [U, {"role": "assistant", "content": "two " * n}]} for n in range(1, 40)]
    made = render(rows)
    lengths = np.array(list(map(len, made.train["input_ids"])))
    stats = made.stats
    assert (stats.length_min, stats.length_max) == (lengths.min(), lengths.max())
    assert stats.length_median == np.sort(lengths)[19]


def test_the_tiny_world_and_real_rows_render_with_the_tiny_base():
    from align.config.sections import ModelSection
    from align.models.tokenizer import load_tokenizer
    from align.resources import shipped

    base = str(shipped("recipes") / "tiny" / "base")
    tokenizer = load_tokenizer(ModelSection(model_name_or_path=base))
    world = DataSection(dataset_name="tiny-world", dataset_train_split="sft[:100]", max_length=256)
    rows = training_rows(world, tokenizer, "sft")
    assert rows.stats.ended_share == 1.0
    assert rows.stats.kept == 100
    real = DataSection(
        dataset_name="gsm8k-sample",
        columns={"prompt": "question", "completion": "answer"},
        max_length=1024,
    )
    rows = training_rows(real, tokenizer, "sft")
    assert rows.stats.kept == 200
    assert {ids.count(tokenizer.bos_token_id) for ids in rows.train["input_ids"]} == {1}
