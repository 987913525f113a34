"""Functions and calls under many templates: ids, what is in the loss, and what a template leaves out."""

import copy
import json
from pathlib import Path

import pytest
import trl
from tool_rows import ASKS, BARE, CALL, CALLED, CHAT, RESULT, ROW, SONGS, A, U, shown, trained

from align.data.sequences import render_messages, render_prompt
from align.errors import AlignError

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


def test_several_calls_at_once(llama31, render_with_tools):
    both = [CALL, {"name": "songs", "arguments": {}}]
    row = render_with_tools(
        [{"messages": [U, ASKS | {"tool_calls": both}, RESULT, A], "tools": [SONGS]}]
    )
    text = trained(llama31, row.train[0])
    second = '{"type": "function", "name": "songs", "parameters": {}}'
    assert f"[[{CALLED.removesuffix('<|eot_id|>')}{second}<|eot_id|>]]" in text


def test_calls_in_messages_of_their_own_are_one_turn(llama31, render_with_tools):
    call = {"role": "tool_call", "content": json.dumps(BARE)}
    row = render_with_tools([{"messages": [U, call, call, RESULT, A], "tools": [SONGS]}]).train[0]
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


def test_a_call_may_end_with_a_token_of_its_own(tokenizer_for):
    """Harmony ends a call with another token than an answer, and both are learned."""
    folder = Path(trl.__file__).parent / "chat_templates"
    tokenizer = tokenizer_for((folder / "gptoss.jinja").read_text())
    described = {**SONGS, "function": {"name": "songs", "description": "Some songs."}}
    row = render_messages(tokenizer, CHAT, tools=[described])
    assert row.input_ids == tokenizer.apply_chat_template(CHAT, tools=[described])["input_ids"]
    text = shown(tokenizer, row.input_ids, row.loss_mask)
    assert '<|message|>{"n": 3}<|call|>]]' in text
    assert text.endswith("a and b<|return|>]]")
    assert render_messages(tokenizer, CHAT[:2], tools=[described]).ended


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
def test_what_a_template_leaves_out_is_an_error_with_the_row(
    render_with_tools, tokenizer_for, name, kind
):
    template, message = REFUSED[name]
    tokenizer = tokenizer_of(tokenizer_for, template)
    with pytest.raises(AlignError) as caught:
        render_with_tools([{"messages": [U, A]}, ROW], kind, tokenizer)
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


def test_llama3_has_no_place_for_tools_and_says_the_way_out(render_with_tools, bpe, llama31):
    with pytest.raises(AlignError) as caught:
        render_with_tools([ROW], tokenizer=bpe)
    (problem,) = caught.value.problems
    assert "`tools`" in problem.message
    assert "`llama3.1`" in problem.hint
    assert "data.use_tools: false" in problem.hint
    # Without the column the calls are still there, and Llama 3 cannot write them either.
    with pytest.raises(AlignError, match="does not write the calls"):
        render_with_tools([ROW], tokenizer=bpe, use_tools=False)
    row = {"messages": [U, A], "tools": [SONGS]}
    assert render_with_tools([row], tokenizer=bpe, use_tools=False).train.to_list() == (
        render_with_tools([{"messages": [U, A]}], tokenizer=bpe).train.to_list()
    )
    columns = {"messages": "messages", "tools": "tools"}
    text = trained(llama31, render_with_tools([row], use_tools=False, columns=columns).train[0])
    assert "songs" not in text


def test_a_template_of_its_own_for_tools_is_used(llama31, bpe):
    both = copy.deepcopy(llama31)
    both.chat_template = {"default": bpe.chat_template, "tool_use": llama31.chat_template}
    assert render_messages(both, CHAT, tools=[SONGS]) == (
        render_messages(llama31, CHAT, tools=[SONGS])
    )
    assert render_messages(both, [U, A]) == render_messages(bpe, [U, A])
