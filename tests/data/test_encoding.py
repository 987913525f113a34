"""Piece by piece or in one go: the same ids."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data.encoding import Encoder
from align.data.layout import Layout, Protected, Typesetter, protect
from align.errors import Problem
from align.models.tokenizer import chat_facts

FAMILIES = ["llama3", "chatml", "mistral", "gemma", "phi3", "metaspace"]
quick = settings(max_examples=25, deadline=None)


@pytest.fixture(scope="module")
def tokenizers(families):
    """The families, and a vocabulary in SentencePiece's manner that puts a space before a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    alphabet = [chr(code) for code in range(10, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the answer is no", "how many ships are there"] * 9, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    made.chat_template = families["mistral"].chat_template
    return families | {"metaspace": made}


TEXT = st.text(st.characters(min_codepoint=10, max_codepoint=126), max_size=20)


@pytest.mark.parametrize("family", FAMILIES)
@quick
@given(asked=TEXT, answer=TEXT)
def test_pieces_have_the_ids_of_the_whole(tokenizers, family, asked, answer):
    tokenizer = tokenizers[family]
    chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": f"a{answer}"}]
    (layout,) = Typesetter(tokenizer).chats([chat])
    encoder = Encoder(tokenizer)
    if layout.protected.originals:
        return
    (whole,) = encoder.encode([layout])
    layout.spans, layout.cuts = [], []
    in_one_go = tokenizer(layout.text, add_special_tokens=False).input_ids
    assert encoder.in_pieces(layout).ids == in_one_go
    if not whole.split:
        assert whole.ids == in_one_go


@pytest.mark.parametrize("family", FAMILIES)
def test_escaped_text_is_tokenized_as_ordinary_text(tokenizers, family):
    """A control token written in a message has the ids of its characters, joined as any others."""
    tokenizer = tokenizers[family]
    token = chat_facts(tokenizer).turn_ends[0]
    (layout,) = Typesetter(tokenizer).chats(
        [[{"role": "user", "content": "a"}, {"role": "assistant", "content": f"b {token} c"}]]
    )
    (encoded,) = Encoder(tokenizer).encode([layout])
    low, high = encoded.spans[0]
    inner = encoded.ids[low : high - 1]
    assert not set(inner) & set(chat_facts(tokenizer).control.values())
    assert tokenizer.decode(inner).strip() == f"b {token} c"


def test_control_tokens_that_the_template_did_not_write_are_refused(families):
    """Whatever lets one through, its row is not used."""
    tokenizer = families["llama3"]
    layout = Layout("<|begin_of_text|>a<|eot_id|>", control=(tokenizer.bos_token_id,))
    (problem,) = Encoder(tokenizer).encode([layout])
    assert isinstance(problem, Problem)
    assert "control tokens are not those that the template writes" in problem.message


def test_a_vocabulary_that_spells_a_control_token_from_text_is_outwitted():
    """A word-level vocabulary has no other id for `<end>`; it is broken apart."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1, "a": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<end>"
    )
    layout = Typesetter(tokenizer).plain("a <end> a", "")
    (encoded,) = Encoder(tokenizer).encode([layout])
    assert encoded.ids.count(1) == 1
    assert encoded.ids[-1] == 1


@settings(deadline=None)
@given(contents=st.lists(st.text(max_size=6) | st.sampled_from(["<|a|>", "<|b|>", "\U000f0000"])))
def test_stand_ins_can_be_taken_back(contents):
    import re

    pattern = re.compile(r"<\|[ab]\|>")
    taken, protected = protect(contents, pattern)
    assert not any(pattern.search(text) for text in taken)
    assert [protected.restore(text) for text in taken] == contents


def test_contents_without_control_tokens_stay_as_they_are():
    import re

    assert protect(["a", "b"], re.compile("x")) == (["a", "b"], Protected())
