"""A small trained tokenizer under the chat templates of five model families, and files of rows."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
        "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n'"
        " + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "phi3": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
}

FAMILIES = {
    # family: begin, end, pad, special tokens, other added tokens, tokens that swallow what follows
    "llama3": (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|finetune_right_pad_id|>",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        [],
        [],
    ),
    # As in several ChatML models, the turn tokens are added but not special.
    "chatml": (None, "<|endoftext|>", "<|pad|>", [], ["<|im_start|>", "<|im_end|>"], []),
    "mistral": ("<s>", "</s>", "<pad>", [], [], []),
    "gemma": ("<bos>", "<eos>", "<pad>", ["<start_of_turn>", "<end_of_turn>"], [], []),
    "phi3": (
        "<s>",
        "<|endoftext|>",
        "<|pad|>",
        [],
        [],
        ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    ),
}

WORDS = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
"""As in Llama 3, line breaks belong together whatever follows."""

SHIFTING_WORDS = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""As in GPT-2, the last white space before a word is a token of its own."""

CORPUS = [
    "the answer is that the old ship sails at noon and the new one at night",
    "hello there, how are you? I am well, thank you.\n\nWhat is the number of ships?\n",
    "one\n\n\ntwo\n\n\nthree\n\n\nfour",
    "user assistant system model <| im start |> end of text [INST] [/INST] _id",
] * 20


def build(family: str, words: str = WORDS):
    """A byte-level BPE tokenizer with about 400 tokens and the family's control tokens."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    from align.models.tokenizer import shipped_template

    begin, end, pad, special, added, swallowing = FAMILIES[family]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    named = [token for token in (begin, end, pad) if token]
    tokens = [AddedToken(token, normalized=False) for token in named + special]
    tokens += [AddedToken(token, normalized=False, rstrip=True) for token in swallowing]
    backend.add_special_tokens(tokens)
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in added])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=begin,
        eos_token=end,
        pad_token=pad,
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = shipped_template("llama3") if family == "llama3" else TEMPLATES[family]
    return made


@pytest.fixture(scope="session")
def families():
    """Family -> tokenizer; `shifting` has Llama 3's template on a vocabulary in which the last line
    break of a header is tokenized by what follows it."""
    made = {family: build(family) for family in FAMILIES}
    return made | {"shifting": build("llama3", SHIFTING_WORDS)}


@pytest.fixture(scope="session")
def bpe(families):
    """The tokenizer in Llama 3's format."""
    return families["llama3"]


@pytest.fixture(scope="session")
def tokenizer_for():
    """A function: template -> a tokenizer that has the control tokens named in it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def make(template: str):
        found = re.findall(r"<\|[^<>{}\s|]*\|>|<(?:start|end)_of_turn>", template)
        tokens = list(dict.fromkeys(["<bos>", "<eos>", "<pad>", *found]))
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(token, normalized=False) for token in tokens])
        made = PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
        )
        made.chat_template = template
        return made

    return make


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Write rows as JSON Lines and return the path."""

    def to_file(rows: list, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return to_file


@pytest.fixture(scope="session")
def llama31(bpe):
    """The same vocabulary under Llama 3.1's template, which has a place for tools."""
    import copy

    from align.models.tokenizer import shipped_template

    made = copy.deepcopy(bpe)
    made.chat_template = shipped_template("llama3.1")
    return made


@pytest.fixture
def render_with_tools(write, llama31):
    """A function: rows (or a path), kind, keys of the data section -> rendered rows."""

    from align.config.sections import DataSection
    from align.data.rendering import prompt_rows, training_rows

    def run(rows, kind="sft", tokenizer=llama31, *, options=None, **keys):
        path = rows if isinstance(rows, str) else write(rows)
        data = DataSection(dataset_name=path, max_length=None, **keys)
        if kind == "prompts":
            return prompt_rows(data, tokenizer)
        return training_rows(data, tokenizer, kind, **(options or {}))

    return run


@pytest.fixture
def render(write, bpe):
    """A function: rows (or the path of a file), kind, keys of the data section -> rendered rows."""
    from align.config.sections import DataSection
    from align.data.rendering import prompt_rows, training_rows

    def run(rows, kind="sft", *, options=None, **keys):
        path = rows if isinstance(rows, str) else write(rows)
        data = DataSection(dataset_name=path, **keys)
        if kind == "prompts":
            return prompt_rows(data, bpe)
        return training_rows(data, bpe, kind, **(options or {}))

    return run
