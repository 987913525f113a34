"""Functions, calls and their results in rows: what is rendered, in the loss, and refused."""

import copy
import json
from contextlib import suppress
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import trl
from datasets import Dataset, Features, Json, List
from hypothesis import given, settings
from hypothesis import strategies as st

from align.config.sections import DataSection
from align.data.conversations import Conversation
from align.data.rendering import prompt_rows, training_rows
from align.data.sequences import Renderer, render_messages, render_prompt
from align.data.tool_use import RowError, calls, functions
from align.errors import AlignError
from align.models.tokenizer import shipped_template

SONGS = {
    "type": "function",
    "function": {
        "name": "songs",
        "parameters": {
            "type": "object",
            "properties": {"n": {"type": "integer", "default": None}},
        },
    },
}
WEATHER = {"name": "weather", "parameters": {"city": {"type": "str"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "songs", "arguments": {"n": 3}}}
U = {"role": "user", "content": "Songs?"}
ASKS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": "songs", "tool_call_id": "c1", "content": '["a", "b"]'}
A = {"role": "assistant", "content": "a and b"}
CHAT = [U, ASKS, RESULT, A]
ROW = {"messages": CHAT, "tools": [SONGS]}

OFFER = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    "These functions can be called. To call one, answer with nothing but JSON of the form "
    '{"type": "function", "name": its name, "parameters": its arguments by name}.\n\n'
    '{"type": "function", "function": {"name": "songs", "parameters": {"type": "object", '
    '"properties": {"n": {"type": "integer", "default": null}}}}}\n\n<|eot_id|>'
    "<|start_header_id|>user<|end_header_id|>\n\nSongs?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
CALLED = '{"type": "function", "name": "songs", "parameters": {"n": 3}}<|eot_id|>'
ANSWERED = (
    '<|start_header_id|>ipython<|end_header_id|>\n\n["a", "b"]<|eot_id|>'
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
WRITTEN = f"{OFFER}[[{CALLED}]]{ANSWERED}[[a and b<|eot_id|>]]"
"""The row as Llama 3.1's shipped template writes it, with [[ ]] around what is in the loss."""

CHATML = (
    "{% if tools %}{{ '<|im_start|>system\n<tools>' }}{% for t in tools %}{{ t | tojson }}"
    "{% endfor %}{{ '</tools><|im_end|>\n' }}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}{% for c in m.tool_calls or [] %}"
    "{{ '<tool_call>' + (c.function.name | tojson) + ': ' + (c.function.arguments | tojson)"
    " + '</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BRACKETS = (
    "{{ '<bos>' }}{% if tools %}{{ '<|tools|>' + (tools | tojson) + '<|/tools|>' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|inst|>' + m.content + '<|/inst|>' }}"
    "{% elif m.role == 'tool' %}"
    "{% if m.tool_call_id is not defined %}{{ raise_exception('a result needs its id') }}{% endif %}"
    "{{ '<|result|>' + m.content + '<|/result|>' }}"
    "{% elif m.tool_calls is defined %}{{ '<|calls|>' }}{% for c in m.tool_calls %}"
    "{{ c.function.name + '<|args|>' + (c.function.arguments | tojson) }}{% endfor %}{{ '<eos>' }}"
    "{% else %}{{ m.content + '<eos>' }}{% endif %}{% endfor %}"
)
"""Control tokens inside a call, none around an answer's beginning, as in Mistral's newer templates."""


@pytest.fixture(scope="module")
def llama31(bpe):
    made = copy.deepcopy(bpe)
    made.chat_template = shipped_template("llama3.1")
    return made


@pytest.fixture
def render(write, llama31):
    """A function: rows (or a path), kind, keys of the data section -> rendered rows."""

    def run(rows, kind="sft", tokenizer=llama31, *, options=None, **keys):
        path = rows if isinstance(rows, str) else write(rows)
        data = DataSection(dataset_name=path, max_length=None, **keys)
        if kind == "prompts":
            return prompt_rows(data, tokenizer)
        return training_rows(data, tokenizer, kind, **(options or {}))

    return run


def shown(tokenizer, ids, mask) -> str:
    text = ""
    for on, group in groupby(zip(ids, mask, strict=True), key=lambda pair: bool(pair[1])):
        piece = tokenizer.decode([token for token, _ in group])
        text += f"[[{piece}]]" if on else piece
    return text


def trained(tokenizer, row) -> str:
    return shown(tokenizer, row["input_ids"], [label != -100 for label in row["labels"]])


# --- spellings --------------------------------------------------------------------------------

BARE = {"name": "songs", "arguments": {"n": 3}}
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
def test_every_spelling_gives_the_same_tokens(render, llama31, name):
    rows = render([SPELLINGS[name]])
    assert trained(llama31, rows.train[0]) == WRITTEN
    assert "with tools and calls of tools" in rows.notes[0]


def test_another_column_of_tools(render, llama31):
    row = {"messages": CHAT, "functions": [SONGS]}
    columns = {"messages": "messages", "tools": "functions"}
    assert trained(llama31, render([row], columns=columns).train[0]) == WRITTEN


def test_rows_with_and_without_tools_mix(render, llama31):
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
    rows = render([ROW, other, plain, plain | {"tools": []}, plain | {"tools": None}]).train
    assert trained(llama31, rows[0]) == WRITTEN
    text = trained(llama31, rows[1])
    assert json.dumps(WEATHER) + "\n\n<|eot_id|>" in text
    assert '"parameters": {"city": ["Rome", null]}}' in text
    alone = render([plain]).train[0]
    assert rows[2] == rows[3] == rows[4] == alone
    assert "ipython" not in llama31.decode(alone["input_ids"])


def test_parquet_with_the_empty_keys_of_other_rows(render, llama31, tmp_path):
    """A table unifies objects: keys of other rows come as None, and are taken for not there."""
    other = [U, ASKS | {"tool_calls": [{"id": None, "type": None, "function": BARE | {"x": 1}}]}]
    table = pa.Table.from_pylist(
        [
            {"messages": [*other, RESULT, A], "tools": [WEATHER | {"type": None}]},
            ROW,
        ]
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    rows = render(str(tmp_path / "rows.parquet")).train
    # The default was null: nothing in the table tells that from a key that is not there.
    expected = WRITTEN.replace(', "default": null', "")
    assert trained(llama31, rows[1]) == expected
    assert json.dumps(WEATHER) in llama31.decode(rows[0]["input_ids"])


def test_columns_of_json_keep_what_was_null(llama31, tmp_path, render):
    features = Features({"messages": List(Json()), "tools": List(Json())})
    Dataset.from_list([ROW], features=features).to_parquet(tmp_path / "rows.parquet")
    rows = render(str(tmp_path / "rows.parquet")).train
    assert trained(llama31, rows[0]) == WRITTEN


def test_a_column_of_json_text_in_a_table(render, llama31, tmp_path):
    table = pa.table({"messages": [[U, A]], "tools": [json.dumps([SONGS])]})
    pq.write_table(table, tmp_path / "rows.parquet")
    rows = render(str(tmp_path / "rows.parquet")).train
    assert trained(llama31, rows[0]) == f"{OFFER}[[a and b<|eot_id|>]]"


# --- templates ----------------------------------------------------------------------------------


def tokenizer_of(tokenizer_for, template: str):
    made = tokenizer_for(template)
    made.chat_template = template
    return made


@pytest.mark.parametrize("template", ["llama3.1", CHATML, BRACKETS], ids=["llama", "chatml", "[]"])
def test_ids_are_those_of_apply_chat_template(llama31, tokenizer_for, template):
    """As TRL calls it; and the loss is on calls and answers, each with the token that ends it."""
    tokenizer = llama31 if template == "llama3.1" else tokenizer_of(tokenizer_for, template)
    row = render_messages(tokenizer, CHAT, tools=[SONGS])
    assert row.input_ids == tokenizer.apply_chat_template(CHAT, tools=[SONGS])["input_ids"]
    prompt = tokenizer.apply_chat_template(CHAT[:3], tools=[SONGS], add_generation_prompt=True)
    assert render_prompt(tokenizer, CHAT[:3], [SONGS]) == prompt["input_ids"]
    assert row.input_ids[: len(prompt["input_ids"])] == prompt["input_ids"]
    learned = shown(tokenizer, row.input_ids, row.loss_mask)
    expected = {
        "llama3.1": f"[[{CALLED}]]",
        CHATML: '[[<tool_call>"songs": {"n": 3}</tool_call><|im_end|>]]',
        BRACKETS: '[[<|calls|>songs<|args|>{"n": 3}<eos>]]',
    }
    assert expected[template] in learned
    assert learned.count("[[") == 2
    assert row.ended


def test_a_content_beside_calls_is_learned(llama31):
    chat = [U, ASKS | {"content": "Let me look."}, RESULT, A]
    row = render_messages(llama31, chat, tools=[SONGS])
    assert f"[[Let me look.{CALLED}]]" in shown(llama31, row.input_ids, row.loss_mask)


def test_several_calls_at_once(llama31, render):
    both = [CALL, {"name": "songs", "arguments": {}}]
    row = render([{"messages": [U, ASKS | {"tool_calls": both}, RESULT, A], "tools": [SONGS]}])
    text = trained(llama31, row.train[0])
    second = '{"type": "function", "name": "songs", "parameters": {}}'
    assert f"[[{CALLED.removesuffix('<|eot_id|>')}{second}<|eot_id|>]]" in text


def test_calls_in_messages_of_their_own_are_one_turn(llama31, render):
    call = {"role": "tool_call", "content": json.dumps(BARE)}
    row = render([{"messages": [U, call, call, RESULT, A], "tools": [SONGS]}]).train[0]
    assert trained(llama31, row).count("[[") == 2


THANKS = [U, {"role": "assistant", "content": "bye", "tool_calls": [CALL]}]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_instruct_2507", "qwen3_vl", "lfm2_v2"])
def test_calls_found_without_markers_are_those_that_trl_marks(tokenizer_for, name):
    """TRL keeps each template twice: as published, and with markers for training."""
    folder = Path(trl.__file__).parent / "chat_templates"
    ours = tokenizer_for((folder / f"{name}.jinja").read_text())
    theirs = tokenizer_for((folder / f"{name}_training.jinja").read_text())
    chat = [*CHAT, *THANKS]
    row = render_messages(ours, chat, tools=[SONGS])
    marked = theirs.apply_chat_template(
        chat, tools=[SONGS], return_dict=True, return_assistant_tokens_mask=True
    )
    assert row.input_ids == marked["input_ids"]
    masks = list(zip(row.input_ids, row.loss_mask, marked["assistant_masks"], strict=True))
    assert not [token for token, mine, other in masks if mine and not other]
    more = ours.decode([token for token, mine, other in masks if other and not mine])
    assert more.strip() == ""


@pytest.mark.parametrize("name", ["llama3_1", "llama3_2"])
def test_metas_published_templates(tokenizer_for, name):
    """They put the functions into the user's turn, take one call a turn, and drop its content."""
    folder = Path(trl.__file__).parent / "chat_templates"
    tokenizer = tokenizer_for((folder / f"{name}.jinja").read_text())
    row = render_messages(tokenizer, CHAT, tools=[SONGS])
    assert row.input_ids == tokenizer.apply_chat_template(CHAT, tools=[SONGS])["input_ids"]
    text = shown(tokenizer, row.input_ids, row.loss_mask)
    assert '[[{"name": "songs", "parameters": {"n": 3}}<|eot_id|>]]' in text
    assert text.endswith("[[a and b<|eot_id|>]]")
    with pytest.raises(AlignError, match="leaves out the content of message 6 beside its calls"):
        render_messages(tokenizer, [*CHAT, *THANKS], tools=[SONGS])
    two = ASKS | {"tool_calls": [CALL, CALL]}
    with pytest.raises(AlignError, match="single tool-calls"):
        render_messages(tokenizer, [U, two, RESULT, A], tools=[SONGS])


def test_calls_in_a_template_that_rewrites_earlier_turns(tokenizer_for):
    """Earlier answers are found where a later turn calls; a call itself is not, and that is said."""
    folder = Path(trl.__file__).parent / "chat_templates"
    tokenizer = tokenizer_for((folder / "qwen3_6.jinja").read_text())
    row = render_messages(tokenizer, [U, A, *CHAT], tools=[SONGS])
    text = shown(tokenizer, row.input_ids, row.loss_mask)
    assert text.count("[[") == 3
    assert "[[a and b<|im_end|>]]" in text
    with pytest.raises(AlignError, match="where they begin cannot be told"):
        render_messages(tokenizer, [*CHAT, U, A], tools=[SONGS])


CONCATENATED = CHATML.replace("(c.function.arguments | tojson)", "c.function.arguments")
PRINTED = CHATML.replace("(c.function.arguments | tojson)", "(c.function.arguments | string)")


@pytest.mark.parametrize("template", [CONCATENATED, PRINTED])
def test_templates_that_take_arguments_as_text_get_json(tokenizer_for, template):
    tokenizer = tokenizer_of(tokenizer_for, template)
    row = render_messages(tokenizer, CHAT, tools=[SONGS])
    assert '<tool_call>"songs": {"n": 3}</tool_call>' in tokenizer.decode(row.input_ids)


REFUSED = {
    "no tools": (CHATML.replace("{% if tools %}", "{% if none %}"), "does not read them"),
    "no calls": (CHATML.replace("m.tool_calls or []", "[]"), "calls (`tool_calls`) of message 2"),
    "no arguments": (
        CHATML.replace("(c.function.arguments | tojson)", "''"),
        "calls (`tool_calls`) of message 2",
    ),
    "no results": (
        CHATML.replace("(m.content or '')", "('' if m.role == 'tool' else m.content)"),
        "what the tool answers in message 3",
    ),
    "no end": (
        CHATML.replace(
            "{{ '<|im_end|>\n' }}{% endfor %}",
            "{{ '<|im_end|>\n' if not m.tool_calls }}{% endfor %}",
        ),
        "does not end message 2",
    ),
    "its own words": (BRACKETS.replace("is not defined", "is defined"), "a result needs its id"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("kind", ["sft", "prompts"])
def test_what_a_template_leaves_out_is_an_error_with_the_row(render, tokenizer_for, name, kind):
    template, message = REFUSED[name]
    tokenizer = tokenizer_of(tokenizer_for, template)
    with pytest.raises(AlignError) as caught:
        render([{"messages": [U, A]}, ROW], kind, tokenizer)
    (problem,) = caught.value.problems
    assert message in problem.message
    assert problem.where.endswith("rows.jsonl row 2")
    assert "chat_template_path" in problem.hint


def test_a_content_that_is_dropped_beside_calls_is_an_error(tokenizer_for):
    template = CHATML.replace("(m.content or '')", "('' if m.tool_calls else m.content)")
    tokenizer = tokenizer_of(tokenizer_for, template)
    assert render_messages(tokenizer, CHAT).loss_mask.count(1)
    with pytest.raises(AlignError, match="leaves out the content of message 2"):
        render_messages(tokenizer, [U, ASKS | {"content": "Well."}, RESULT, A])


def test_llama3_has_no_place_for_tools_and_says_the_way_out(render, bpe, llama31):
    with pytest.raises(AlignError) as caught:
        render([ROW], tokenizer=bpe)
    (problem,) = caught.value.problems
    assert "`tools`" in problem.message
    assert "`llama3.1`" in problem.hint
    assert "data.use_tools: false" in problem.hint
    # Without the column the calls are still there, and Llama 3 cannot write them either.
    with pytest.raises(AlignError, match="does not write the calls"):
        render([ROW], tokenizer=bpe, use_tools=False)
    row = {"messages": [U, A], "tools": [SONGS]}
    assert render([row], tokenizer=bpe, use_tools=False).train.to_list() == (
        render([{"messages": [U, A]}], tokenizer=bpe).train.to_list()
    )
    columns = {"messages": "messages", "tools": "tools"}
    text = trained(llama31, render([row], use_tools=False, columns=columns).train[0])
    assert "songs" not in text


def test_a_template_of_its_own_for_tools_is_used(llama31, bpe):
    both = copy.deepcopy(llama31)
    both.chat_template = {"default": bpe.chat_template, "tool_use": llama31.chat_template}
    assert render_messages(both, CHAT, tools=[SONGS]) == (
        render_messages(llama31, CHAT, tools=[SONGS])
    )
    assert render_messages(both, [U, A]) == render_messages(bpe, [U, A])


# --- pairs and prompts ---------------------------------------------------------------------------

PAIR = {"prompt": [U], "chosen": [ASKS], "rejected": [A], "tools": [SONGS]}


def test_pairs_are_rendered_with_their_tools(render, llama31):
    dpo = render([PAIR], "dpo").train[0]
    assert llama31.decode(dpo["prompt_ids"]) == OFFER
    assert llama31.decode(dpo["chosen_ids"]) == CALLED
    assert llama31.decode(dpo["rejected_ids"]) == "a and b<|eot_id|>"
    reward = render([PAIR], "reward").train[0]
    assert reward["chosen_ids"] == dpo["prompt_ids"] + dpo["chosen_ids"]
    assert reward["rejected_ids"] == dpo["prompt_ids"] + dpo["rejected_ids"]
    implicit = {"chosen": [U, ASKS], "rejected": [U, A], "tools": json.dumps([SONGS])}
    assert render([implicit], "dpo").train[0] == dpo


def test_the_format_mask_leaves_calls_to_their_author(render, llama31):
    long = PAIR | {"chosen": [ASKS, RESULT, A]}
    row = render([long], "dpo", options={"mask_format": True}).train[0]
    text = shown(llama31, row["chosen_ids"], row["chosen_mask"])
    call = CALLED.removesuffix("<|eot_id|>")
    assert text == (
        f"[[{call}]]<|eot_id|><|start_header_id|>ipython<|end_header_id|>\n\n"
        '[["a", "b"]]]<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n'
        "[[a and b]]<|eot_id|>"
    ).replace('[["a", "b"]]]', '[[["a", "b"]]]')


def test_prompts_offer_their_tools_and_keep_them(render, llama31):
    row = render([ROW], "prompts").train[0]
    assert llama31.decode(row["prompt_ids"]) == OFFER + CALLED + ANSWERED
    assert json.loads(row["tools"]) == [SONGS]
    called = render([ROW | {"messages": [U, ASKS]}], "prompts").train[0]
    assert llama31.decode(called["prompt_ids"]) == OFFER


def test_sources_of_prompts_with_and_without_tools_mix(write, llama31):
    plain = write([{"prompt": [U]}] * 2, "plain.jsonl")
    tools = write([{"messages": CHAT, "tools": [SONGS]}] * 2, "tools.jsonl")
    data = DataSection(datasets=[{"path": plain}, {"path": tools}], max_length=None)
    rows = prompt_rows(data, llama31).train
    assert sorted(row["tools"] is None for row in rows) == [False, False, True, True]


def test_completions_are_rendered_with_their_tools(render, llama31):
    row = {"prompt": [U], "completion": [ASKS, RESULT, A], "tools": [SONGS]}
    assert trained(llama31, render([row]).train[0]) == WRITTEN
    late = {"prompt": CHAT[:3], "completion": [A], "tools": [SONGS]}
    assert trained(llama31, render([late]).train[0]) == (
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
def test_a_bad_row_is_named_with_its_number(render, row, message):
    with pytest.raises(AlignError) as caught:
        render([ROW, row])
    (problem,) = caught.value.problems
    assert message in problem.message
    assert problem.where.endswith("rows.jsonl row 2")


def test_plain_text_has_no_template_for_functions(render):
    plain = {"prompt": "a", "completion": "b"}
    with pytest.raises(AlignError, match="plain text, which no chat template renders") as caught:
        render([plain, plain | {"tools": [SONGS]}])
    assert caught.value.problems[0].where.endswith("row 2")
    assert len(render([plain | {"tools": "hammer"}]).train) == 1
    assert len(render([plain | {"tools": [SONGS]}], use_tools=False).train) == 1


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
