"""Functions, calls and their results in rows: what is rendered, in the loss, and refused."""

import json
from contextlib import suppress

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Json, List
from hypothesis import given, settings
from hypothesis import strategies as st
from tool_rows import (
    ANSWERED,
    ASKS,
    BARE,
    CALL,
    CALLED,
    CHAT,
    OFFER,
    RESULT,
    ROW,
    SONGS,
    WEATHER,
    WRITTEN,
    A,
    U,
    shown,
    trained,
)

from align.config.sections import DataSection
from align.data.conversations import Conversation
from align.data.exact import turn_text
from align.data.rendering import prompt_rows
from align.data.sequences import Renderer, render_messages
from align.data.tool_use import RowError, calls, functions
from align.errors import AlignError

# --- spellings --------------------------------------------------------------------------------

SPELLINGS = {
    "as objects": ROW,
    "tools as JSON text": ROW | {"tools": json.dumps([SONGS])},
    "each tool as JSON text": ROW | {"tools": [json.dumps(SONGS)]},
    "a single tool": ROW | {"tools": SONGS},
    "arguments as JSON text": ROW
    | {
        "messages": [
            U,
            ASKS
            | {"tool_calls": [CALL | {"function": {"name": "songs", "arguments": '{"n": 3}'}}]},
            RESULT,
            A,
        ]
    },
    "no content": ROW | {"messages": [U, ASKS | {"content": None}, RESULT, A]},
    "calls as JSON text": ROW
    | {"messages": [U, ASKS | {"tool_calls": json.dumps([CALL])}, RESULT, A]},
    "a bare call": ROW | {"messages": [U, ASKS | {"tool_calls": [BARE]}, RESULT, A]},
    "parameters": ROW
    | {
        "messages": [
            U,
            ASKS | {"tool_calls": [{"name": "songs", "parameters": {"n": 3}}]},
            RESULT,
            A,
        ]
    },
    "function_call": ROW
    | {
        "messages": [
            U,
            {"role": "assistant", "content": None, "function_call": BARE},
            {"role": "function", "name": "songs", "content": RESULT["content"]},
            A,
        ]
    },
    "ipython": ROW | {"messages": [U, ASKS, {**RESULT, "role": "ipython"}, A]},
    "ShareGPT": {
        "tools": json.dumps([SONGS]),
        "conversations": [
            {"from": "human", "value": "Songs?"},
            {"from": "function_call", "value": json.dumps(BARE)},
            {"from": "observation", "value": RESULT["content"]},
            {"from": "gpt", "value": "a and b"},
        ],
    },
    "ms-swift": {
        "tools": json.dumps([SONGS]),
        "messages": [
            U,
            {"role": "tool_call", "content": json.dumps(BARE)},
            {"role": "tool_response", "content": RESULT["content"]},
            A,
        ],
    },
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_gives_the_same_tokens(render_with_tools, llama31, name):
    rows = render_with_tools([SPELLINGS[name]])
    assert trained(llama31, rows.train[0]) == WRITTEN
    assert "with tools and calls of tools" in rows.notes[0]


def test_another_column_of_tools(render_with_tools, llama31):
    row = {"messages": CHAT, "functions": [SONGS]}
    columns = {"messages": "messages", "tools": "functions"}
    assert trained(llama31, render_with_tools([row], columns=columns).train[0]) == WRITTEN


def test_rows_with_and_without_tools_mix(render_with_tools, llama31):
    """Functions and arguments that differ from row to row stay as they are."""
    other = {
        "messages": [
            U,
            ASKS | {"tool_calls": [{"name": "weather", "arguments": {"city": ["Rome", None]}}]},
            RESULT,
            A,
        ],
        "tools": [WEATHER],
    }
    plain = {"messages": [U, A]}
    rows = render_with_tools(
        [ROW, other, plain, plain | {"tools": []}, plain | {"tools": None}]
    ).train
    assert trained(llama31, rows[0]) == WRITTEN
    text = trained(llama31, rows[1])
    assert json.dumps(WEATHER) + "\n\n<|eot_id|>" in text
    assert '"parameters": {"city": ["Rome", null]}}' in text
    alone = render_with_tools([plain]).train[0]
    assert rows[2] == rows[3] == rows[4] == alone
    assert "ipython" not in llama31.decode(alone["input_ids"])


def test_shards_with_and_without_tools_are_one_source(render_with_tools, llama31, write, tmp_path):
    """Shards of one split whose messages have other keys, and none of what was written is lost."""
    marked = {"messages": [U, A | {"weight": 0}, U, A]}
    for number, row in enumerate(({"messages": [U, A]}, ROW, marked)):
        write([row], f"shards/train-{number:05d}.jsonl")
    rows = render_with_tools(str(tmp_path / "shards")).train
    plain = "[[a and b<|eot_id|>]]"
    assert trained(llama31, rows[0]).count(plain) == 1
    assert trained(llama31, rows[1]) == WRITTEN
    assert trained(llama31, rows[2]).count("a and b") == 2
    assert trained(llama31, rows[2]).count(plain) == 1


def test_parquet_with_the_empty_keys_of_other_rows(render_with_tools, llama31, tmp_path):
    """A table unifies objects: keys of other rows come as None, and are taken for not there."""
    other = [U, ASKS | {"tool_calls": [{"id": None, "type": None, "function": BARE | {"x": 1}}]}]
    table = pa.Table.from_pylist(
        [
            {"messages": [*other, RESULT, A], "tools": [WEATHER | {"type": None}]},
            ROW,
        ]
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    rows = render_with_tools(str(tmp_path / "rows.parquet")).train
    # The default was null: nothing in the table tells that from a key that is not there.
    expected = WRITTEN.replace(', "default": null', "")
    assert trained(llama31, rows[1]) == expected
    assert json.dumps(WEATHER) in llama31.decode(rows[0]["input_ids"])


def test_columns_of_json_keep_what_was_null(llama31, tmp_path, render_with_tools):
    features = Features({"messages": List(Json()), "tools": List(Json())})
    Dataset.from_list([ROW], features=features).to_parquet(tmp_path / "rows.parquet")
    rows = render_with_tools(str(tmp_path / "rows.parquet")).train
    assert trained(llama31, rows[0]) == WRITTEN


def test_a_column_of_json_text_in_a_table(render_with_tools, llama31, tmp_path):
    table = pa.table({"messages": [[U, A]], "tools": [json.dumps([SONGS])]})
    pq.write_table(table, tmp_path / "rows.parquet")
    rows = render_with_tools(str(tmp_path / "rows.parquet")).train
    assert trained(llama31, rows[0]) == f"{OFFER}[[a and b<|eot_id|>]]"


# --- pairs and prompts ---------------------------------------------------------------------------

PAIR = {"prompt": [U], "chosen": [ASKS], "rejected": [A], "tools": [SONGS]}


def test_pairs_are_rendered_with_their_tools(render_with_tools, llama31):
    dpo = render_with_tools([PAIR], "dpo").train[0]
    assert llama31.decode(dpo["prompt_ids"]) == OFFER
    assert llama31.decode(dpo["chosen_ids"]) == CALLED
    assert llama31.decode(dpo["rejected_ids"]) == "a and b<|eot_id|>"
    reward = render_with_tools([PAIR], "reward").train[0]
    assert reward["chosen_ids"] == dpo["prompt_ids"] + dpo["chosen_ids"]
    assert reward["rejected_ids"] == dpo["prompt_ids"] + dpo["rejected_ids"]
    implicit = {"chosen": [U, ASKS], "rejected": [U, A], "tools": json.dumps([SONGS])}
    assert render_with_tools([implicit], "dpo").train[0] == dpo


def test_the_format_mask_leaves_calls_to_their_author(render_with_tools, llama31):
    long = PAIR | {"chosen": [ASKS, RESULT, A]}
    row = render_with_tools([long], "dpo", options={"mask_format": True}).train[0]
    text = shown(llama31, row["chosen_ids"], row["chosen_mask"])
    call = CALLED.removesuffix("<|eot_id|>")
    assert text == (
        f"[[{call}]]<|eot_id|><|start_header_id|>ipython<|end_header_id|>\n\n"
        '[["a", "b"]]]<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n'
        "[[a and b]]<|eot_id|>"
    ).replace('[["a", "b"]]]', '[[["a", "b"]]]')


def test_prompts_offer_their_tools_and_keep_them(render_with_tools, llama31):
    row = render_with_tools([ROW], "prompts").train[0]
    assert llama31.decode(row["prompt_ids"]) == OFFER + CALLED + ANSWERED
    assert json.loads(row["tools"]) == [SONGS]
    called = render_with_tools([ROW | {"messages": [U, ASKS]}], "prompts").train[0]
    assert llama31.decode(called["prompt_ids"]) == OFFER


def test_sources_of_prompts_with_and_without_tools_mix(write, llama31):
    plain = write([{"prompt": [U]}] * 2, "plain.jsonl")
    tools = write([{"messages": CHAT, "tools": [SONGS]}] * 2, "tools.jsonl")
    data = DataSection(datasets=[{"path": plain}, {"path": tools}], max_length=None)
    rows = prompt_rows(data, llama31).train
    assert sorted(row["tools"] is None for row in rows) == [False, False, True, True]


def test_completions_are_rendered_with_their_tools(render_with_tools, llama31):
    row = {"prompt": [U], "completion": [ASKS, RESULT, A], "tools": [SONGS]}
    assert trained(llama31, render_with_tools([row]).train[0]) == WRITTEN
    late = {"prompt": CHAT[:3], "completion": [A], "tools": [SONGS]}
    assert trained(llama31, render_with_tools([late]).train[0]) == (
        f"{OFFER}{CALLED}{ANSWERED}[[a and b<|eot_id|>]]"
    )


# --- rows that are wrong -------------------------------------------------------------------------


def with_calls(value) -> dict:
    return {"messages": [U, ASKS | {"tool_calls": value}, RESULT, A], "tools": [SONGS]}


BAD = [
    (ROW | {"tools": "hammer"}, "`tools` is text and no list of functions; `data.use_tools"),
    (ROW | {"tools": [{"x": 1}]}, "entry 1 of `tools` is no function"),
    (ROW | {"tools": [SONGS, 3]}, "entry 2 of `tools` is no function"),
    (with_calls([{"function": {"arguments": {}}}]), "call 1 of `tool_calls` of message 2"),
    (with_calls(["nonsense"]), "call 1 of `tool_calls` of message 2 of `messages` is text"),
    (with_calls([BARE | {"arguments": "{n: 3}"}]), "`arguments` that are no JSON object: '{n: 3}'"),
    (with_calls([BARE | {"arguments": [3]}]), "`arguments` that are no JSON object"),
    ({"messages": [U | {"tool_calls": [CALL]}, A]}, "message 1 of `messages` calls a tool"),
    ({"messages": [U, {"role": "function_call", "content": ""}, A]}, "without a call"),
    ({"messages": [U, ASKS, RESULT]}, "ends on a turn of the tool"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_bad_row_is_named_with_its_number(render_with_tools, row, message):
    with pytest.raises(AlignError) as caught:
        render_with_tools([ROW, row])
    (problem,) = caught.value.problems
    assert message in problem.message
    assert problem.where.endswith("rows.jsonl row 2")


def test_plain_text_has_no_template_for_functions(render_with_tools):
    plain = {"prompt": "a", "completion": "b"}
    with pytest.raises(AlignError, match="plain text, which no chat template renders") as caught:
        render_with_tools([plain, plain | {"tools": [SONGS]}])
    assert caught.value.problems[0].where.endswith("row 2")
    assert len(render_with_tools([plain | {"tools": "hammer"}]).train) == 1
    assert len(render_with_tools([plain | {"tools": [SONGS]}], use_tools=False).train) == 1


# --- properties ----------------------------------------------------------------------------------

texts = st.text(st.sampled_from('ab "\\\n{}<|é'), max_size=8) | st.sampled_from(
    ["<|eot_id|>", "<|start_header_id|>system<|end_header_id|>", "<|begin_of_text|>"]
)
names = st.text("abc_", min_size=1, max_size=6)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
made_calls = st.lists(
    st.builds(
        lambda name, arguments: {"name": name, "arguments": arguments},
        names,
        st.dictionaries(texts, values, max_size=3),
    ),
    min_size=1,
    max_size=2,
)
made_tools = st.lists(
    st.builds(
        lambda name, text, more: {"name": name, "description": text, "parameters": more},
        names,
        texts,
        values,
    ),
    min_size=1,
    max_size=2,
)


@settings(deadline=None, max_examples=60)
@given(offered=made_tools, called=made_calls, result=texts, content=texts)
def test_nothing_in_functions_and_calls_becomes_a_control_token(
    llama31, offered, called, result, content
):
    """And the text is that of the template, whatever is in the row."""
    chat = [
        U,
        {"role": "assistant", "content": content, "tool_calls": calls(called, "x")},
        {"role": "tool", "content": result},
        A,
    ]
    (row,) = Renderer(llama31).chats([chat], tools=[offered])
    text = llama31.apply_chat_template(
        Conversation.of(chat, offered).turns, tools=offered, tokenize=False
    )
    assert llama31.decode(row.input_ids) == text
    control = [token for token in row.input_ids if token in set(llama31.all_special_ids)]
    plain = render_messages(llama31, [U, A, RESULT, A], tools=[SONGS])
    assert control == [t for t in plain.input_ids if t in set(llama31.all_special_ids)]
    learned = shown(llama31, row.input_ids, row.loss_mask)
    assert learned.count("]]") >= 2
    assert learned.endswith("[[a and b<|eot_id|>]]")


@settings(deadline=None, max_examples=40)
@given(offered=made_tools, called=made_calls)
def test_functions_and_calls_come_back_from_a_file_as_they_were(tmp_path_factory, offered, called):
    from align.data.files import read_table

    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [
        {"messages": [ASKS | {"tool_calls": called}], "tools": offered},
        {"messages": [U], "tools": None},
        ROW,
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    first, second, third = read_table(file).to_pylist()
    assert functions(first["tools"], "tools") == offered
    assert calls(first["messages"][0]["tool_calls"], "x") == calls(called, "x")
    assert (functions(second["tools"], "tools"), second["messages"][0]["tool_calls"]) == (
        None,
        None,
    )
    assert functions(third["tools"], "tools") == [SONGS]


@given(value=values)
def test_any_value_is_a_list_of_functions_or_refused(value):
    with suppress(RowError):
        found = functions(value, "tools")
        assert found is None or all(isinstance(item, dict) for item in found)


def test_readers_see_calls_as_json():
    call = {"function": {"name": "songs", "arguments": {}}}
    assert turn_text({"content": "hi"}) == "hi"
    assert turn_text({"content": "", "tool_calls": [call]}) == json.dumps([call])
    assert (
        turn_text({"content": "hi", "tool_calls": json.dumps([call])})
        == f"hi\n{json.dumps([call])}"
    )
