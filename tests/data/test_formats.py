"""Every form of rows that users bring, and what is said of rows that are wrong."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.config.sections import DataSection
from align.data.conversion import HH_ASSISTANT, HH_HUMAN, ranked, transcript
from align.data.conversion import pairs as three_way
from align.data.formats import recognise, to_canonical
from align.data.sources import load_sources
from align.errors import AlignError

U = {"role": "user", "content": "hi"}
A = {"role": "assistant", "content": "ho"}
B = {"role": "assistant", "content": "no"}
S = {"role": "system", "content": "be kind"}
CHAT = {"messages": [U, A]}


@pytest.fixture
def canonical(write):
    """A function: rows, purpose, keys of the data section -> canonical rows and what was said."""

    def convert(rows: list[dict], purpose: str, **keys):
        data = DataSection(dataset_name=write(rows), **keys)
        (source,) = load_sources(data)
        form = recognise(source, purpose)
        return to_canonical(source, form, data).dataset.to_list(), form.sentence

    return convert


DEMONSTRATIONS = {
    "messages": ({"messages": [S, U, A]}, {"messages": [S, U, A]}, "chats in messages"),
    "parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "ho"}]},
            ]
        },
        {"messages": [U, A]},
        "chats in messages",
    ),
    "sharegpt": (
        {
            "conversations": [
                {"from": "system", "value": "be kind"},
                {"from": "human", "value": "hi"},
                {"from": "gpt", "value": "ho"},
            ]
        },
        {"messages": [S, U, A]},
        "ShareGPT conversations",
    ),
    "sharegpt with a system column": (
        {
            "system": "be kind",
            "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}],
        },
        {"messages": [S, U, A]},
        "ShareGPT conversations",
    ),
    "alpaca": (
        {"instruction": "add", "input": "1 and 2", "output": "3"},
        {
            "messages": [
                {"role": "user", "content": "add\n\n1 and 2"},
                {"role": "assistant", "content": "3"},
            ]
        },
        "Alpaca instructions, as chats",
    ),
    "alpaca with history": (
        {
            "instruction": "hi",
            "input": "",
            "output": "ho",
            "system": "be kind",
            "history": [["a", "b"]],
        },
        {
            "messages": [
                S,
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                U,
                A,
            ]
        },
        "Alpaca instructions",
    ),
    "plain completions": (
        {"prompt": "hi", "completion": "ho"},
        {"prompt": "hi", "completion": "ho"},
        "prompts and completions in plain text",
    ),
    "completions in messages": (
        {"prompt": [S, U], "completion": [A]},
        {"prompt": [S, U], "completion": [A]},
        "prompts and completions in messages",
    ),
    "text": ({"text": "hi ho"}, {"text": "hi ho"}, "plain text, all of it in the loss"),
}


@pytest.mark.parametrize("name", DEMONSTRATIONS)
def test_demonstrations_are_recognised_and_said(canonical, name):
    row, expected, said = DEMONSTRATIONS[name]
    rows, sentence = canonical([row], "demonstrations")
    assert rows == [expected]
    assert f"rows.jsonl: 1 row of {said}" in sentence


HH = "\n\nHuman: hi\n\nAssistant: ho"
EXPLICIT = {"prompt": [U], "chosen": [A], "rejected": [B]}

PREFERENCES = {
    "explicit": (EXPLICIT, [EXPLICIT], "preference pairs in messages"),
    "implicit": (
        {"chosen": [U, A], "rejected": [U, B]},
        [EXPLICIT],
        "preference pairs in messages",
    ),
    "implicit beside a text prompt": (
        {"prompt": "hi", "chosen": [U, A], "rejected": [U, B]},
        [EXPLICIT],
        "preference pairs in messages",
    ),
    "a text prompt to messages": (
        {"prompt": "hi", "chosen": [A], "rejected": [B]},
        [EXPLICIT],
        "preference pairs in messages",
    ),
    "plain": (
        {"prompt": "hi", "chosen": "ho", "rejected": "no"},
        [{"prompt": "hi", "chosen": "ho", "rejected": "no"}],
        "preference pairs in plain text without a chat template",
    ),
    "plain and implicit": (
        {"chosen": "say hi here", "rejected": "say ho"},
        [{"prompt": "say ", "chosen": "hi here", "rejected": "ho"}],
        "preference pairs in plain text",
    ),
    "hh-rlhf": (
        {"chosen": HH, "rejected": "\n\nHuman: hi\n\nAssistant: no"},
        [EXPLICIT],
        "hh-rlhf transcripts",
    ),
    "margin": (
        EXPLICIT | {"margin": 2},
        [EXPLICIT | {"margin": 2.0}],
        "preference pairs in messages with a margin",
    ),
    "scores": (
        {"chosen": [U, A], "rejected": [U, B], "score_chosen": 8.0, "score_rejected": 5.5},
        [EXPLICIT | {"margin": 2.5}],
        "preference pairs in messages with a margin",
    ),
    "orca": (
        {"system": "be kind", "instruction": "hi", "chosen": "ho", "rejected": "no"},
        [EXPLICIT | {"prompt": [S, U]}],
        "preference pairs in messages",
    ),
    "edited": (
        EXPLICIT | {"edited": [{"role": "assistant", "content": "oh"}]},
        [
            EXPLICIT | {"chosen": [{"role": "assistant", "content": "oh"}], "rejected": [A]},
            EXPLICIT | {"chosen": [{"role": "assistant", "content": "oh"}]},
            EXPLICIT,
        ],
        "preference pairs in messages",
    ),
    "edited without a change": (
        EXPLICIT | {"edited": [A]},
        [EXPLICIT],
        "preference pairs in messages",
    ),
    "edited in plain text": (
        {"prompt": "1 + 1 =", "edited": " 2", "chosen": " two", "rejected": " 3"},
        [
            {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " two"},
            {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"},
            {"prompt": "1 + 1 =", "chosen": " two", "rejected": " 3"},
        ],
        "preference pairs in plain text",
    ),
    "ranking": (
        {"prompt": "hi", "ranking": ["oh", "ho", "no"]},
        [
            EXPLICIT
            | {"chosen": [{"role": "assistant", "content": "oh"}], "rejected": [A], "margin": 1.0},
            EXPLICIT | {"chosen": [{"role": "assistant", "content": "oh"}], "margin": 2.0},
            EXPLICIT | {"margin": 1.0},
        ],
        "ranked answers in messages with a margin",
    ),
    "ranking of messages": (
        {"prompt": [U], "ranking": [[A], [B]]},
        [EXPLICIT | {"margin": 1.0}],
        "ranked answers in messages with a margin",
    ),
    "ranked": (
        {
            "context": [U],
            "completions": [{"rank": 2, "completion": [B]}, {"rank": 1, "completion": [A]}],
        },
        [EXPLICIT | {"margin": 1.0}],
        "ranked answers in messages with a margin",
    ),
    "nectar": (
        {
            "prompt": "\n\nHuman: hi\n\nAssistant: ",
            "answers": [
                {"answer": "ho", "rank": 1.0},
                {"answer": "no", "rank": 3.0},
                {"answer": "nay", "rank": 3.0},
            ],
        },
        [
            EXPLICIT | {"margin": 2.0},
            EXPLICIT | {"rejected": [{"role": "assistant", "content": "nay"}], "margin": 2.0},
        ],
        "hh-rlhf transcripts with a margin",
    ),
    "scored answers": (
        {
            "instruction": "hi",
            "completions": [{"response": "no", "score": 1}, {"response": "ho", "score": 4}],
        },
        [EXPLICIT | {"margin": 3.0}],
        "ranked answers in messages with a margin",
    ),
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences_are_recognised_and_said(canonical, name):
    row, expected, said = PREFERENCES[name]
    rows, sentence = canonical([row], "preference")
    assert rows == expected
    assert f"1 row of {said}" in sentence


WORDS = st.text("abcdef", min_size=1, max_size=4)


@given(st.lists(WORDS, min_size=2, max_size=5))
@settings(max_examples=60, deadline=None)
def test_a_ranking_gives_every_pair_in_its_order_once(answers):
    pairs = list(ranked({"prompt": "hi", "ranking": answers}, "ranking", None))
    found = [(pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in pairs]
    places = [(i, j) for i in range(len(answers)) for j in range(i + 1, len(answers))]
    expected = [(answers[i], answers[j], j - i) for i, j in places if answers[i] != answers[j]]
    assert sorted(found) == sorted((better, worse) for better, worse, _ in expected)
    margins = sorted(pair["margin"] for pair in pairs)
    assert margins == sorted(gap for _, _, gap in expected)


@given(WORDS, WORDS, WORDS)
@settings(max_examples=60, deadline=None)
def test_an_edited_answer_stands_above_chosen_and_rejected(edited, chosen, rejected):
    row = {"prompt": "hi", "edited": edited, "chosen": chosen, "rejected": rejected}
    if chosen == rejected:
        return
    found = [(p["chosen"], p["rejected"]) for p in three_way(row, False, False, None)]
    new = [] if edited in (chosen, rejected) else [(edited, chosen), (edited, rejected)]
    assert found == [*new, (chosen, rejected)]


PROMPTS = {
    "messages": ({"prompt": [U], "id": 7}, [U]),
    "plain": ({"prompt": "hi", "id": 7}, "hi"),
    "chats without their last answer": ({"messages": [S, U, A], "id": 7}, [S, U]),
    "chats beside a plain prompt": ({"messages": [S, U, A], "prompt": "hi", "id": 7}, [S, U]),
    "sharegpt": ({"conversations": [{"from": "human", "value": "hi"}], "id": 7}, [U]),
    "alpaca": ({"instruction": "hi", "output": "ho", "id": 7}, [U]),
    "hh-rlhf": ({"chosen": HH, "rejected": HH, "id": 7}, [U]),
    "pairs": ({"chosen": [U, A], "rejected": [U, B], "id": 7}, [U]),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_recognised_and_other_columns_kept(canonical, name):
    row, expected = PROMPTS[name]
    rows, _ = canonical([row], "prompts")
    assert rows == [row | {"prompt": expected}]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"prompt": "q", "completion": "a"}, {"prompt": "hi", "completion": "ho"}),
        ({"instruction": "q", "output": "a"}, CHAT),
        ({"messages": "chat"}, {"messages": [U, B]}),
    ],
)
def test_a_mapping_decides_whatever_the_other_columns_say(canonical, columns, expected):
    row = {"q": "hi", "a": "ho", "chat": [U, B], "text": "unused"}
    rows, sentence = canonical([row], "demonstrations", columns=columns)
    assert rows == [expected]
    assert "from" in sentence


def test_mapped_columns_of_prompts_reach_the_judge(canonical):
    rows, _ = canonical([{"q": "hi", "a": "4"}], "prompts", columns={"prompt": "q", "answer": "a"})
    assert rows == [{"q": "hi", "a": "4", "answer": "4", "prompt": "hi"}]


def test_only_good_completions_of_unpaired_rows_are_used(canonical):
    rows = [{"prompt": "a", "completion": c, "label": c == "good"} for c in ("good", "bad")]
    made, sentence = canonical(rows, "demonstrations")
    assert made == [{"prompt": "a", "completion": "good"}]
    assert "those with a true `label`" in sentence


def test_a_system_prompt_goes_in_front_of_rows_without_one(canonical):
    rows, _ = canonical([CHAT, {"messages": [S, U, A]}], "demonstrations", system_prompt="be brief")
    assert [row["messages"][0]["content"] for row in rows] == ["be brief", "be kind"]
    pairs, _ = canonical([EXPLICIT], "preference", system_prompt="be brief")
    assert pairs[0]["prompt"] == [{"role": "system", "content": "be brief"}, U]


def test_a_system_prompt_needs_chats(canonical):
    with pytest.raises(AlignError, match=r"needs chats, and .* holds plain text"):
        canonical([{"prompt": "a", "completion": "b"}], "demonstrations", system_prompt="be kind")


def test_a_text_that_begins_with_human_is_no_transcript_yet(canonical):
    rows, _ = canonical([{"prompt": "Human: hi"}], "prompts")
    assert rows == [{"prompt": "Human: hi"}]
    rows, _ = canonical([{"prompt": "Human: hi\n\nAssistant:"}], "prompts")
    assert rows == [{"prompt": [U]}]


WRONG_PURPOSE = [
    ("demonstrations", EXPLICIT, "holds preference pairs", "completion: chosen"),
    (
        "demonstrations",
        {"chosen": HH, "rejected": HH},
        "holds preference pairs",
        "messages: chosen",
    ),
    ("demonstrations", {"prompt": "a"}, "holds prompts only", "align sample"),
    ("preference", CHAT, "holds demonstrations", "align sft"),
    ("preference", {"prompt": "a"}, "holds prompts only", "align sample"),
    (
        "demonstrations",
        {"question": "a", "answer": "b"},
        "no demonstrations of a known",
        "output: ",
    ),
    ("prompts", {"question": "a"}, "are no prompts of a known form", "{prompt: ...}"),
]


@pytest.mark.parametrize(("purpose", "row", "message", "hint"), WRONG_PURPOSE)
def test_rows_for_another_purpose_are_refused_with_the_way_out(
    canonical, purpose, row, message, hint
):
    with pytest.raises(AlignError, match=message) as caught:
        canonical([row], purpose)
    assert hint in caught.value.problems[0].hint


def test_the_way_out_for_pairs_works(canonical):
    rows, _ = canonical(
        [EXPLICIT], "demonstrations", columns={"prompt": "prompt", "completion": "chosen"}
    )
    assert rows == [{"prompt": [U], "completion": [A]}]
    pair = {"chosen": HH, "rejected": HH.replace("ho", "no")}
    rows, _ = canonical([pair], "demonstrations", columns={"messages": "chosen"})
    assert rows == [CHAT]


def test_a_forced_format_names_the_columns_it_lacks(canonical):
    with pytest.raises(AlignError, match="has no column `instruction` and `output`"):
        canonical([CHAT], "demonstrations", format="alpaca")


def test_an_unknown_mapped_column_is_named_with_the_nearest(canonical):
    with pytest.raises(AlignError, match="no column `questin`") as caught:
        canonical([{"question": "a"}], "prompts", columns={"prompt": "questin"})
    assert caught.value.problems[0].hint == "did you mean `question`?"


BAD_ROWS = [
    ("demonstrations", CHAT, {"messages": []}, "`messages` is empty"),
    ("demonstrations", CHAT, {"messages": None}, "is nothing and not a list of messages"),
    ("demonstrations", CHAT, {"messages": [U]}, "`messages` ends on a turn of the user"),
    (
        "demonstrations",
        CHAT,
        {"messages": [{"role": "narrator", "content": "x"}, A]},
        "message 1 of `messages` has the unknown role 'narrator'",
    ),
    (
        "demonstrations",
        CHAT,
        {"messages": [{"role": "user", "content": None}, A]},
        "message 1 of `messages` has nothing as its content",
    ),
    ("demonstrations", CHAT, {"messages": [{"content": "x"}, A]}, "has no `role`"),
    (
        "demonstrations",
        CHAT,
        {"messages": [U, {"role": "assistant", "content": " "}]},
        "ends with an empty answer",
    ),
    (
        "demonstrations",
        CHAT,
        {"messages": [U, {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
        "call 1 of `tool_calls` of message 2 of `messages` names no function",
    ),
    (
        "demonstrations",
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": None},
        "`completion` is nothing and not text",
    ),
    (
        "demonstrations",
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": ""},
        "`completion` is empty",
    ),
    ("preference", EXPLICIT, EXPLICIT | {"rejected": [A]}, "`chosen` and `rejected` are the same"),
    ("preference", EXPLICIT, EXPLICIT | {"prompt": None}, "there is no `prompt`"),
    (
        "preference",
        EXPLICIT,
        {"prompt": None, "chosen": [U, A], "rejected": [{**U, "content": "x"}, B]},
        "do not part at an answer to the same prompt",
    ),
    (
        "preference",
        EXPLICIT,
        EXPLICIT | {"chosen": [A, U]},
        "`chosen` ends on a turn of the user",
    ),
    (
        "preference",
        EXPLICIT | {"margin": 1.0},
        EXPLICIT | {"margin": None},
        "`score_chosen` is nothing and not a number",
    ),
    ("prompts", {"prompt": [U]}, {"prompt": [S]}, "`prompt` has no user's turn to answer"),
    ("prompts", {"prompt": "a"}, {"prompt": ""}, "`prompt` is empty"),
]


@pytest.mark.parametrize(("purpose", "good", "bad", "message"), BAD_ROWS)
def test_a_bad_row_is_named_with_its_number(canonical, purpose, good, bad, message):
    with pytest.raises(AlignError) as caught:
        canonical([good, good, bad], purpose)
    (problem,) = caught.value.problems
    assert message in problem.message
    assert problem.where.endswith("rows.jsonl row 3")


def test_problems_are_told_together_and_counted(canonical):
    with pytest.raises(AlignError) as caught:
        canonical([{"messages": [U]}] * 25, "demonstrations")
    problems = caught.value.problems
    assert [problem.where.rpartition(" ")[2] for problem in problems[:10]] == [
        str(number) for number in range(1, 11)
    ]
    assert problems[10].message == "... and 15 more rows with problems"


def test_the_row_number_is_the_one_in_the_file(canonical):
    with pytest.raises(AlignError, match="row 4: "):
        canonical(
            [CHAT] * 3 + [{"messages": []}], "demonstrations", dataset_train_split="train[2:]"
        )


def test_few_rows_that_teach_nothing_are_left_out(write):
    data = DataSection(dataset_name=write([EXPLICIT] * 199 + [EXPLICIT | {"rejected": [A]}]))
    (source,) = load_sources(data)
    made = to_canonical(source, recognise(source, "preference"), data)
    assert len(made.dataset) == 199
    (left_out,) = made.left_out
    assert left_out.where.endswith("row 200")
    assert left_out.message == "`chosen` and `rejected` are the same"


turn_texts = st.lists(st.text("ab \n", min_size=1).map(str.strip).filter(bool), min_size=1)


@settings(deadline=None)
@given(texts=turn_texts)
def test_transcripts_are_read_back(texts):
    roles = [("user", HH_HUMAN), ("assistant", HH_ASSISTANT)] * len(texts)
    turns = list(zip(roles, texts, strict=False))
    written = "".join(f"{mark} {text}" for (_, mark), text in turns)
    assert transcript(written) == [{"role": role, "content": text} for (role, _), text in turns]
    assert transcript(f"{written}{HH_ASSISTANT} ") == transcript(written)
