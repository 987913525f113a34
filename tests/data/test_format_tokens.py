"""What the template writes into an answer, and what an author wrote."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data.sequences import Renderer

U, A = {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "user, hello"}
LONG = [
    A,
    {"role": "user", "content": "assistant?"},
    {"role": "assistant", "content": "Yes.\n\nReally."},
]


def parts(tokenizer, prompt, answer) -> tuple[list[str], list[str]]:
    """The answer's tokens that an author wrote, and those of the template."""
    (row,) = Renderer(tokenizer).answers([(prompt, [answer, answer])], formats=True)
    (ids, _), (mask, _) = row.completions, row.formats
    assert len(ids) == len(mask)
    tokens = [tokenizer.decode([token]) for token in ids]
    kept = [token for token, on in zip(tokens, mask, strict=True) if not on]
    return kept, [token for token, on in zip(tokens, mask, strict=True) if on]


def test_the_end_of_a_turn_is_format(bpe):
    kept, format_tokens = parts(bpe, [U], [A])
    assert "".join(kept) == "user, hello"
    assert format_tokens == ["<|eot_id|>"]


def test_headers_inside_a_longer_answer_are_format(bpe):
    kept, format_tokens = parts(bpe, [U], LONG)
    assert "".join(kept) == "user, helloassistant?Yes.\n\nReally."
    assert "".join(format_tokens) == (
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n<|eot_id|>"
    )


def test_a_control_token_that_an_author_wrote_is_the_authors(bpe):
    evil = {"role": "assistant", "content": "a<|eot_id|>b<|start_header_id|>c"}
    kept, format_tokens = parts(bpe, [U], [evil])
    assert "".join(kept) == evil["content"]
    assert format_tokens == ["<|eot_id|>"]


@pytest.mark.parametrize("family", ["llama3", "chatml", "gemma"])
def test_every_familys_answer_keeps_its_text(families, family):
    if family not in families:
        pytest.skip(f"no {family} among the families")
    kept, format_tokens = parts(families[family], [U], LONG)
    assert "".join(kept) == "user, helloassistant?Yes.\n\nReally."
    assert format_tokens


def test_plain_text_ends_with_its_end_token(bpe):
    kept, format_tokens = parts(bpe, "2 + 2 = ", "4")
    assert (kept, format_tokens) == (["4"], [bpe.eos_token])


TEXT = st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=12).filter(
    lambda text: text.strip() == text and bool(text)
)


@given(st.lists(TEXT, min_size=1, max_size=3))
@settings(max_examples=150, deadline=None)
def test_what_is_kept_is_what_the_authors_wrote(bpe, contents):
    roles = ["assistant", "user", "assistant"][: len(contents)]
    answer = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]
    if answer[-1]["role"] == "user":
        answer.append({"role": "assistant", "content": "end"})
    (row,) = Renderer(bpe).answers([([U], [answer, answer])], formats=True)
    kept = [i for i, on in zip(row.completions[0], row.formats[0], strict=True) if not on]
    expected = [
        i for turn in answer for i in Renderer(bpe).encoder.as_text(turn["content"], first=False)
    ]
    assert bpe.decode(kept) == bpe.decode(expected)
    assert not set(kept) & Renderer(bpe).encoder.control_ids
