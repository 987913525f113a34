"""Config files of a model folder that older and other readers understand too.

transformers 5 writes `rope_parameters`, `dtype`, `TokenizersBackend` and a list of
`extra_special_tokens`. Readers of the older names take no notice of them: Ollama's converter then
assumes a rope base of 10,000, and transformers 4 finds no tokenizer. Here both spellings are
written, and transformers 5 reads the same model from them.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.durable import write_json, write_text
from align.errors import fail

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION = re.compile(r"\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}")
"""The markers of answers in a chat template: for training, and unknown to llama.cpp."""

NOISE = ("_name_or_path", "name_or_path", "backend", "is_local", "local_files_only")
"""Keys that only say how a file was loaded here."""

PROBES: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "Q1"}],
    [
        {"role": "user", "content": "Q1"},
        {"role": "assistant", "content": "A1"},
        {"role": "user", "content": "Q2"},
        {"role": "assistant", "content": "A2"},
        {"role": "user", "content": "Q3"},
    ],
)
"""Chats that a template is compared on."""


def make_portable(folder: Path) -> "PreTrainedTokenizerBase":
    """Write the configs of a saved model or adapter for every reader; returns the tokenizer read back.

    Raises:
        AlignError: the tokenizer or its chats come out differently than before.
    """
    from transformers import AutoTokenizer

    before = AutoTokenizer.from_pretrained(folder)
    if (folder / "config.json").is_file():  # an adapter has none
        _edit(folder / "config.json", portable_config)
    template = None
    if before.chat_template is not None:
        template = without_markers(before.get_chat_template())
        write_text(folder / "chat_template.jinja", template, flush=False)
    _edit(
        folder / "tokenizer_config.json",
        lambda config: (
            portable_tokenizer(config) | ({"chat_template": template} if template else {})
        ),
    )
    after: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    _check_same(before, after, folder)
    return after


def _edit(file: Path, change: Any) -> None:
    write_json(file, change(json.loads(file.read_text(encoding="utf-8"))), flush=False)


def portable_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json with the names of transformers 4 beside those of transformers 5."""
    made = {key: value for key, value in config.items() if key not in NOISE}
    made["use_cache"] = True  # training turns it off, and servers read it
    if "dtype" in made:
        made["torch_dtype"] = made["dtype"]
    rope = made.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        made["rope_theta"] = rope["rope_theta"]
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        kind = scaling.get("rope_type", "default")
        made["rope_scaling"] = None if kind == "default" else {**scaling, "type": kind}
    return made


def portable_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json with a class and special tokens that transformers 4 knows."""
    made = {key: value for key, value in config.items() if key not in NOISE}
    if made.get("tokenizer_class") == "TokenizersBackend":
        made["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(made.get("extra_special_tokens"), list):
        made["additional_special_tokens"] = made.pop("extra_special_tokens")
    return made


PORTABLE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "config.json": portable_config,
    "tokenizer_config.json": portable_tokenizer,
}
"""File -> what makes it readable to others."""


def without_markers(template: str) -> str:
    """A chat template without `{% generation %}`; comments in its place strip the same white space."""
    return GENERATION.sub(r"{#\1 \2#}", template)


def _check_same(
    before: "PreTrainedTokenizerBase", after: "PreTrainedTokenizerBase", folder: Path
) -> None:
    from align.models.tokenizer import render_text

    text = "A text, \n\n <|eot_id|> 12345 and  more."
    same = before(text)["input_ids"] == after(text)["input_ids"]
    same &= before.get_vocab() == after.get_vocab()
    same &= before.special_tokens_map.get("eos_token") == after.special_tokens_map.get("eos_token")
    if before.chat_template is not None:
        for opened in (False, True):
            chats = list(PROBES)
            rendered = [
                render_text(tokenizer, chats, add_generation_prompt=opened)
                for tokenizer in (before, after)
            ]
            same &= rendered[0] == rendered[1]
    if not same:
        fail(
            "its tokenizer cannot be written for other readers without changing what it does",
            where=str(folder),
            hint="`align merge` writes it as transformers does",
        )
