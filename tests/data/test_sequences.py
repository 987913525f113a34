"""Token ids and loss masks of chats under five families of templates."""

from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from align.data.sequences import (
    Renderer,
    render_completion,
    render_messages,
    render_pair,
    render_prompt,
    render_text,
)
from align.errors import AlignError
from align.models.tokenizer import chat_facts
from align.models.tokenizer import render_text as template_text

FAMILIES = ["llama3", "chatml", "mistral", "gemma", "phi3"]
LOSSLESS = ["llama3", "chatml", "mistral", "gemma"]
"""Families none of whose tokens swallows white space, so that ids decode to the rendered text."""


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def shown(tokenizer, ids: list[int], mask: list[int]) -> str:
    """The decoded tokens, with [[ ]] around those in the loss."""
    text = ""
    for on, group in groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1]):
        piece = tokenizer.decode([token for token, _ in group])
        text += f"[[{piece}]]" if on else piece
    return text


CHAT = [user("How many ships?"), assistant("two ships"), user("And now?"), assistant("none")]

EXPECTED = {
    "llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHow many ships?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[two ships<|eot_id|>]]"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd now?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[none<|eot_id|>]]"
    ),
    "chatml": (
        "<|im_start|>user\nHow many ships?<|im_end|>\n"
        "<|im_start|>assistant\n[[two ships<|im_end|>]]\n"
        "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n[[none<|im_end|>]]\n"
    ),
    "mistral": (
        "<s>[INST] How many ships? [/INST][[ two ships</s>]][INST] And now? [/INST][[ none</s>]]"
    ),
    "gemma": (
        "<bos><start_of_turn>user\nHow many ships?<end_of_turn>\n"
        "<start_of_turn>model\n[[two ships<end_of_turn>]]\n"
        "<start_of_turn>user\nAnd now?<end_of_turn>\n"
        "<start_of_turn>model\n[[none<end_of_turn>]]\n"
    ),
    # Phi-3's tokens swallow the line break behind them; the end of text at the end is no answer.
    "phi3": (
        "<|user|>How many ships?<|end|><|assistant|>[[two ships<|end|>]]"
        "<|user|>And now?<|end|><|assistant|>[[none<|end|>]]<|endoftext|>"
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_on_answers_and_the_token_that_ends_them(families, family):
    row = render_messages(families[family], CHAT)
    assert shown(families[family], row.input_ids, row.loss_mask) == EXPECTED[family]
    assert row.ended


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_apply_chat_template(families, family):
    tokenizer = families[family]
    row = render_messages(tokenizer, CHAT)
    assert row.input_ids == tokenizer.apply_chat_template(CHAT)["input_ids"]
    opened = tokenizer.apply_chat_template(CHAT[:3], add_generation_prompt=True)["input_ids"]
    assert render_prompt(tokenizer, CHAT[:3]) == opened


def test_every_token_is_in_the_loss_on_request(bpe):
    row = render_messages(bpe, CHAT, assistant_only=False)
    assert row.loss_mask == [1] * len(row.input_ids)


def test_masks_equal_those_of_the_template_markers(bpe):
    theirs = bpe.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    row = render_messages(bpe, CHAT)
    assert row.input_ids == theirs["input_ids"]
    assert row.loss_mask == theirs["assistant_masks"]


def test_masks_equal_those_of_the_tiny_base():
    from transformers import AutoTokenizer

    from align.resources import shipped

    tokenizer = AutoTokenizer.from_pretrained(shipped("recipes") / "tiny" / "base")
    chat = [{"role": "system", "content": "Be brief."}, *CHAT]
    theirs = tokenizer.apply_chat_template(
        chat, return_dict=True, return_assistant_tokens_mask=True
    )
    row = render_messages(tokenizer, chat)
    assert (row.input_ids, row.loss_mask) == (theirs["input_ids"], theirs["assistant_masks"])


@pytest.mark.parametrize("name", ["llama3", "cohere", "gemma", "phi3", "qwen3_instruct_2507"])
def test_answers_found_without_markers_are_those_that_trl_marks(tokenizer_for, name):
    """TRL keeps each template twice: as published, and with markers for training."""
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    ours = tokenizer_for((folder / f"{name}.jinja").read_text())
    theirs = tokenizer_for((folder / f"{name}_training.jinja").read_text())
    row = render_messages(ours, CHAT)
    marked = theirs.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    assert row.input_ids == marked["input_ids"]
    masks = list(zip(row.input_ids, row.loss_mask, marked["assistant_masks"], strict=True))
    assert not [token for token, mine, other in masks if mine and not other]
    # TRL also marks the white space and the end of text that some templates write behind a turn.
    more = ours.decode([token for token, mine, other in masks if other and not mine])
    assert more.replace("<eos>", "").strip() == ""


def test_earlier_turns_that_the_template_rewrites_are_found(tokenizer_for):
    """A template that opens each answer with a thought and drops it once the chat goes on."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>"
        "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
        "{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>{% endif %}<|user|>"
    ).removesuffix("<|user|>")
    tokenizer = tokenizer_for(template + "{# <|user|> <|assistant|> <|system|> #}")
    chat = [user("s"), assistant("s"), user("a"), assistant("a")]
    row = render_messages(tokenizer, chat)
    assert shown(tokenizer, row.input_ids, row.loss_mask) == (
        "<|user|>s<|end|><|assistant|>[[s<|end|>]]"
        "<|user|>a<|end|><|assistant|><think>[[</think>a<|end|>]]"
    )


def test_a_template_that_drops_answers_is_refused(tokenizer_for):
    template = "{% for m in messages if m.role == 'user' %}<|user|>{{ m.content }}{% endfor %}"
    with pytest.raises(AlignError, match="leaves out or changes the answer in message 2"):
        render_messages(tokenizer_for(template), CHAT)


def test_a_prompt_that_changes_once_it_is_answered_is_refused(tokenizer_for):
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{{ 'Think first: ' }}{% endif %}"
        "{# <|user|> <|assistant|> #}"
    )
    with pytest.raises(AlignError, match="differently once it is answered"):
        render_completion(tokenizer_for(template), CHAT[:1], CHAT[1:2])


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_completion_are_the_whole(families, family):
    tokenizer = families[family]
    prompt, chosen, rejected = render_pair(
        tokenizer, CHAT[:3], [assistant("none")], [assistant("one, or two")]
    )
    assert prompt == render_prompt(tokenizer, CHAT[:3])
    assert chosen == render_completion(tokenizer, CHAT[:3], CHAT[3:])
    whole = render_messages(tokenizer, CHAT)
    assert prompt + chosen == whole.input_ids[: len(prompt) + len(chosen)]
    last_turn = whole.loss_mask[len(prompt) :]
    assert last_turn[: len(chosen)] == [1] * len(chosen)
    assert not any(last_turn[len(chosen) :])
    assert "one, or two" in tokenizer.decode(rejected)


def test_plain_text_stands_between_begin_and_end(bpe):
    prompt, chosen, rejected = render_pair(bpe, "the ship", " sails", " stays")
    assert bpe.decode(prompt + chosen) == "<|begin_of_text|>the ship sails<|end_of_text|>"
    assert bpe.decode(rejected) == " stays<|end_of_text|>"
    row = render_text(bpe, "the ship")
    assert bpe.decode(row.input_ids) == "<|begin_of_text|>the ship<|end_of_text|>"
    assert row.loss_mask == [1] * len(row.input_ids)


def test_begin_and_end_of_text_are_never_doubled(bpe):
    begin, end = bpe.bos_token_id, bpe.eos_token_id
    prompt, chosen, _ = render_pair(bpe, f"{bpe.bos_token}the ship", f" sails{bpe.eos_token}", "x")
    assert (prompt + chosen).count(begin) == 1
    assert chosen.count(end) == 1
    row = render_messages(bpe, [user(f"{bpe.bos_token}hi"), assistant(f"ho{bpe.bos_token}")])
    assert row.input_ids.count(begin) == 1
    assert row.escaped


def test_a_token_across_the_start_of_an_answer_is_split_there(families):
    """ChatML's header ends in a line break, which may be joined to that of an answer."""
    tokenizer = families["chatml"]
    chat = [user("hello"), assistant("\n\nthe answer")]
    whole = tokenizer.apply_chat_template(chat)["input_ids"]
    prompt = render_prompt(tokenizer, chat[:1])
    assert whole[: len(prompt)] != prompt
    row = render_messages(tokenizer, chat)
    assert row.split
    assert row.input_ids[: len(prompt)] == prompt
    assert tokenizer.decode(row.input_ids) == tokenizer.decode(whole)
    assert row.loss_mask.index(1) == len(prompt)


def test_a_header_whose_tokens_depend_on_the_answer_is_cut_off(families):
    tokenizer = families["shifting"]
    row = render_messages(tokenizer, CHAT)
    assert row.split
    assert row.input_ids != tokenizer.apply_chat_template(CHAT)["input_ids"]
    assert shown(tokenizer, row.input_ids, row.loss_mask) == EXPECTED["llama3"]


def test_a_token_across_the_start_of_a_plain_completion_is_split_there(bpe):
    prompt, completion, _ = render_pair(bpe, "the answ", "er is", "x")
    assert prompt == render_prompt(bpe, "the answ")
    assert bpe.decode(prompt + completion) == "<|begin_of_text|>the answer is<|end_of_text|>"
    renderer = Renderer(bpe)
    (row,) = renderer.completions(["the answ"], ["er is"])
    assert row.split
    assert row.input_ids == prompt + completion
    assert row.loss_mask == [0] * len(prompt) + [1] * len(completion)


def test_what_follows_the_end_of_a_turn_is_no_part_of_a_completion(families):
    completion = render_completion(families["chatml"], [user("hi")], [assistant("ho")])
    assert families["chatml"].decode(completion) == "ho<|im_end|>"


def test_roles_that_the_template_refuses_are_named(families):
    with pytest.raises(AlignError, match=r"user -> user.*roles must alternate"):
        render_messages(families["mistral"], [user("a"), user("b"), assistant("c")])
    with pytest.raises(AlignError, match="no system turn") as caught:
        render_prompt(families["gemma"], [{"role": "system", "content": "s"}, user("a")])
    assert "data.system_prompt" in caught.value.problems[0].hint


def test_one_bad_row_leaves_the_others_of_its_batch(families):
    good, bad = CHAT[:2], [user("a"), user("b")]
    rows = Renderer(families["mistral"]).chats([good, bad, good])
    assert rows[0] == rows[2]
    assert "must alternate" in rows[1].message


def test_chats_need_a_template(bpe):
    plain = bpe.__class__(tokenizer_object=bpe.backend_tokenizer, bos_token=bpe.bos_token)
    with pytest.raises(AlignError, match="no chat template"):
        render_prompt(plain, CHAT[:1])
    assert plain.decode(render_prompt(plain, "hello")) == "<|begin_of_text|>hello"


def hostile(families) -> st.SearchStrategy[str]:
    """Any text with control tokens of any family, whole, cut and doubled, in it."""
    tokens = [token for t in families.values() for token in chat_facts(t).control]
    pieces = st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        st.sampled_from(tokens),
        st.sampled_from([token[:-1] for token in tokens] + [token[1:] for token in tokens]),
        st.sampled_from(["\n", "\n\n", " ", "\U000f0000", "\U000f00000\U000f0000", "[/INST]"]),
    )
    return st.lists(pieces, max_size=6).map("".join)


many = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("family", FAMILIES)
@many
@given(data=st.data())
def test_no_text_becomes_a_control_token(families, family, data):
    tokenizer, texts = families[family], hostile(families)
    facts = chat_facts(tokenizer)
    contents = [data.draw(texts) for _ in range(3)] + [data.draw(texts) + "."]
    chat = [
        {"role": turn["role"], "content": text} for turn, text in zip(CHAT, contents, strict=True)
    ]
    row = render_messages(tokenizer, chat)
    harmless = render_messages(
        tokenizer, [{**turn, "content": "x" if turn["content"].strip() else ""} for turn in chat]
    )
    control = set(facts.control.values())
    assert [i for i in row.input_ids if i in control] == [
        i for i in harmless.input_ids if i in control
    ]
    if family in LOSSLESS:
        assert tokenizer.decode(row.input_ids) == template_text(tokenizer, [chat])[0]


@pytest.mark.parametrize("family", LOSSLESS)
@many
@given(data=st.data())
def test_any_answer_is_in_the_loss_whole_and_alone(families, family, data):
    tokenizer = families[family]
    asked, answer = data.draw(hostile(families)), data.draw(hostile(families)) + "."
    row = render_messages(tokenizer, [user(asked), assistant(answer)])
    loss = [i for i, on in zip(row.input_ids, row.loss_mask, strict=True) if on]
    end = chat_facts(tokenizer).turn_ends[0]
    written = answer.strip() if family in ("llama3", "gemma") else answer
    assert tokenizer.decode(loss) == (f" {answer}" if family == "mistral" else written) + end
    prompt = render_prompt(tokenizer, [user(asked)])
    assert row.input_ids[: len(prompt)] == prompt
    assert render_completion(tokenizer, [user(asked)], [assistant(answer)]) == loss


@pytest.mark.parametrize("family", [*FAMILIES, "shifting"])
@many
@given(data=st.data())
def test_every_turn_begins_where_its_prompt_ends(families, family, data):
    tokenizer, texts = families[family], hostile(families)
    contents = [data.draw(texts) + "." for _ in CHAT]
    chat = [
        {"role": turn["role"], "content": text} for turn, text in zip(CHAT, contents, strict=True)
    ]
    whole = render_messages(tokenizer, chat)
    for turn in (1, 3):
        prompt = render_prompt(tokenizer, chat[:turn])
        completion = render_completion(tokenizer, chat[:turn], chat[turn : turn + 1])
        both = prompt + completion
        assert whole.input_ids[: len(both)] == both
        assert whole.loss_mask[len(prompt) : len(both)] == [1] * len(completion)
        assert not whole.loss_mask[len(prompt) - 1]


@pytest.mark.parametrize("family", FAMILIES)
@many
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1), other=st.text("ab \n"))
def test_ordinary_text_gives_the_ids_of_apply_chat_template(families, family, text, other):
    tokenizer = families[family]
    assume(not chat_facts(tokenizer).pattern.search(text))
    chat = [user(other), assistant(text)]
    row = render_messages(tokenizer, chat)
    whole = tokenizer.apply_chat_template(chat)["input_ids"]
    if row.split:
        assert tokenizer.decode(row.input_ids) == tokenizer.decode(whole)
    else:
        assert row.input_ids == whole
