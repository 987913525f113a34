"""The tokenizer and its chat template: what pads, what ends a turn, which tokens control a chat."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from align.config.sections import ModelSection
from align.errors import fail
from align.models.identity import artifact_hint

TEMPLATES = Path(__file__).parent / "templates"

LLAMA3_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TEMPLATE_TOKENS = dict.fromkeys(("llama3", "llama3.1", "llama3.2"), LLAMA3_TOKENS)
"""Shipped template -> the control tokens it writes, all of which the vocabulary must hold."""

PAD_TOKENS = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]")
"""Made for padding; after these any special token named so, a reserved one, the unknown token."""

MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")

log = logging.getLogger(__name__)


def shipped_template(name: str) -> str:
    """The text of a shipped chat template (`llama3`, `llama3.1`, `llama3.2`)."""
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")


def load_tokenizer(model: ModelSection) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a stage, ready to render chats and to pad.

    It comes from `tokenizer_name_or_path`, else from the adapter's folder where that holds one,
    else from the model. Its chat template is its own, or what `chat_template` says or
    `chat_template_path` names, or the shipped Llama 3 template where it has none and its vocabulary
    holds Llama 3's control tokens.
    Where it still has none, plain text can be rendered and chats cannot. Its pad token ends neither
    a turn nor a text.

    Raises:
        AlignError: no tokenizer there, a template that does not fit it, or nothing to pad with.
    """
    source, revision = _source(model)
    tokenizer = _from_pretrained(source, revision)
    if not tokenizer.is_fast:
        fail(
            "has only a slow tokenizer, which cannot say where its tokens lie",
            where=source,
            hint="name a tokenizer that has a tokenizer.json under model.tokenizer_name_or_path",
        )
    _set_template(tokenizer, model, source)
    _set_pad_token(tokenizer, source)
    return tokenizer


def _source(model: ModelSection) -> tuple[str, str | None]:
    """Folder or Hub id that the tokenizer comes from, and its revision."""
    if model.tokenizer_name_or_path:
        return model.tokenizer_name_or_path, None
    for path in (model.adapter_name_or_path, model.model_name_or_path):
        if path and _holds_tokenizer(Path(path).expanduser()):
            return path, None
    folder = Path(model.model_name_or_path).expanduser()
    if (folder / "adapter_config.json").is_file():
        adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        return str(adapter.get("base_model_name_or_path")), adapter.get("revision")
    return model.model_name_or_path, model.model_revision


def _holds_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def _from_pretrained(source: str, revision: str | None) -> PreTrainedTokenizerBase:
    folder = Path(source).expanduser()
    if folder.is_dir() and not _holds_tokenizer(folder):
        fail(
            "holds no tokenizer (tokenizer.json)",
            where=source,
            hint=artifact_hint(source)
            or "name the base model's folder under model.tokenizer_name_or_path",
        )
    if not folder.exists() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        fail("no such folder", where=source, hint="check the path")
    name = str(folder) if folder.exists() else source
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision or "main", trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        fail(
            f"its tokenizer cannot be loaded: {str(error).splitlines()[0]}",
            where=source,
            hint="check the name; another tokenizer goes into model.tokenizer_name_or_path",
        )
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded


def _set_template(tokenizer: PreTrainedTokenizerBase, model: ModelSection, source: str) -> None:
    if model.chat_template is not None:
        tokenizer.chat_template = model.chat_template
    elif model.chat_template_path is not None:
        tokenizer.chat_template = _read_template(model.chat_template_path, tokenizer)
    elif tokenizer.chat_template is None and not _missing("llama3", tokenizer):
        tokenizer.chat_template = shipped_template("llama3")
        log.warning("%s has no chat template: the shipped `llama3` template is used", source)
    if tokenizer.chat_template is not None:
        chat_facts(tokenizer)


def _missing(template: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    vocabulary = tokenizer.get_vocab()
    return [token for token in TEMPLATE_TOKENS[template] if token not in vocabulary]


def _read_template(path: str, tokenizer: PreTrainedTokenizerBase) -> str:
    where = f"model.chat_template_path: {path}"
    if path in TEMPLATE_TOKENS:
        if missing := _missing(path, tokenizer):
            fail(
                f"the template writes {', '.join(missing)}, and the tokenizer has no such token",
                where=where,
                hint="use a template in the model's own format",
            )
        return shipped_template(path)
    file = Path(path).expanduser()
    if not file.is_file():
        names = ", ".join(f"`{name}`" for name in TEMPLATE_TOKENS)
        fail("no such file", where=where, hint=f"name a Jinja file, or a shipped one: {names}")
    return file.read_text(encoding="utf-8")


def _set_pad_token(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Padding with a token that ends a turn would hide it from the loss, or end texts early."""
    taken = {tokenizer.bos_token_id, tokenizer.eos_token_id, *end_of_turn_ids(tokenizer)}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in taken:
        return
    vocabulary = tokenizer.get_vocab()
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    candidates = [token for token in PAD_TOKENS if token in vocabulary]
    candidates += [token for token in special if "pad" in token.lower()]
    candidates += [token for token in special if re.search("reserved|unused", token)]
    candidates += [tokenizer.unk_token] if tokenizer.unk_token else []
    for token in candidates:
        if vocabulary[token] not in taken:
            tokenizer.pad_token = token
            return
    fail(
        f"has no token to pad with: {tokenizer.eos_token!r} ends a text, and nothing else is spare",
        where=source,
        hint="add one to a copy of the tokenizer, and name that in model.tokenizer_name_or_path",
    )


@dataclass(frozen=True)
class ChatFacts:
    """What a tokenizer and its chat template have in common, found by rendering small chats."""

    control: Mapping[str, int]
    """Control token -> id: nothing in a message may become one of these."""
    pattern: re.Pattern[str]
    """Matches any control token, longer ones first."""
    turn_ends: tuple[str, ...]
    """Control tokens that the template writes behind an answer, the last answer's first."""
    written: tuple[int, ...]
    """Ids of the added tokens that the template itself writes into a chat."""
    has_markers: bool
    """Whether the template has `{% generation %}` markers."""


_FACTS: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[Any, ChatFacts]] = WeakKeyDictionary()


def chat_facts(tokenizer: PreTrainedTokenizerBase) -> ChatFacts:
    """What the renderer has to know of a tokenizer; computed once for each template.

    Control tokens are the special tokens, and the other added tokens which the template writes
    around a user's turn or behind an answer (`<|im_start|>` is not special in every tokenizer).
    """
    template = tokenizer.chat_template
    known = _FACTS.get(tokenizer)
    if known is None or known[0] != template:
        known = (template, _find_facts(tokenizer))
        _FACTS[tokenizer] = known
    return known[1]


def _find_facts(tokenizer: PreTrainedTokenizerBase) -> ChatFacts:
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    special |= set(getattr(tokenizer, "chat_control_tokens", None) or ())
    if tokenizer.chat_template is None:
        control = {token: added[token] for token in added if token in special}
        return ChatFacts(control, _any_of(control), (), (), False)
    user, answer = {"role": "user", "content": "Q1Q"}, {"role": "assistant", "content": "A1A"}
    asked = _probe(tokenizer, [user])
    answered = _probe(tokenizer, [user, answer])
    opened = _probe(tokenizer, [user], add_generation_prompt=True)
    again = _probe(tokenizer, [user, answer, user])
    any_added = _any_of(token for token in added if not token.isspace())

    def behind(content: str, text: str) -> list[str]:
        return any_added.findall(text.partition(content)[2])[:1]

    # An answer inside a chat may end otherwise than the last one, but not with the next turn's
    # header: that is told apart by what ends a user's turn.
    inner = [token for token in behind("A1A", again) if token in behind("Q1Q", asked)]
    turn_ends = tuple(dict.fromkeys([*behind("A1A", answered), *inner]))
    around_user = {*any_added.findall(asked), *turn_ends}
    control = {token: added[token] for token in added if token in special | around_user}
    written = {added[token] for token in any_added.findall(answered + opened)}
    markers = MARKERS.search(tokenizer.get_chat_template()) is not None
    if markers:
        _check_markers(tokenizer)
    return ChatFacts(control, _any_of(control), turn_ends, tuple(sorted(written)), markers)


def _check_markers(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a template whose `{% generation %}` markers do not hold the answers and only these."""
    contents = ("Q1Q", "A1A", "Q2Q", "A2A")
    roles = ("user", "assistant", "user", "assistant")
    chat = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    (text,), (spans,) = render_marked(tokenizer, [chat], markers=True)
    marked = "".join(text[start:end] for start, end in spans)
    if [content for content in contents if content in marked] != ["A1A", "A2A"]:
        fail(
            "the {% generation %} markers of the chat template do not hold just the answers",
            where=f"the tokenizer {tokenizer.name_or_path}",
            hint="mend the markers or take them out: answers are found without them",
        )


def _any_of(tokens: Any) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _probe(
    tokenizer: PreTrainedTokenizerBase,
    chat: list[dict[str, str]],
    add_generation_prompt: bool = False,
) -> str:
    try:
        return render_text(tokenizer, [chat], add_generation_prompt=add_generation_prompt)[0]
    except (TemplateError, TypeError, ValueError) as error:
        fail(
            f"the chat template cannot render a user's turn and an answer: {error}",
            where=f"the tokenizer {tokenizer.name_or_path}",
            hint="give a working template with model.chat_template_path",
        )


def render_text(
    tokenizer: PreTrainedTokenizerBase,
    chats: Sequence[Sequence[Mapping[str, str]]],
    *,
    add_generation_prompt: bool = False,
) -> list[str]:
    """The chats as the template writes them (in transformers' Jinja sandbox)."""
    return render_marked(tokenizer, chats, add_generation_prompt=add_generation_prompt)[0]


def render_marked(
    tokenizer: PreTrainedTokenizerBase,
    chats: Sequence[Sequence[Mapping[str, Any]]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    markers: bool = False,
    add_generation_prompt: bool = False,
) -> tuple[list[str], list[list[tuple[int, int]]]]:
    """As `render_text`, with the characters inside `{% generation %}` markers as (start, end).

    `tools` are the functions that all of these chats offer; a tokenizer with a template of its own
    for them (`tool_use`) is asked for that one.
    """
    given = [dict(tool) for tool in tools] if tools else None
    return render_jinja_template(  # type: ignore[no-any-return]
        conversations=[list(chat) for chat in chats],
        tools=given,
        chat_template=tokenizer.get_chat_template(tools=given),
        return_assistant_tokens_mask=markers,
        add_generation_prompt=add_generation_prompt,
        **tokenizer.special_tokens_map,
    )


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends an assistant's turn, the template's own first.

    That is the token behind the answer in the template, Llama 3.1's `<|eom_id|>` (a turn that
    waits for a tool), and the end of text.
    """
    facts = chat_facts(tokenizer)
    tokens = [*facts.turn_ends, "<|eom_id|>", tokenizer.eos_token]
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[token] for token in tokens if token is not None and token in vocabulary]
    return list(dict.fromkeys(ids))


def control_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the control tokens that the chat template writes, ascending.

    Raises:
        AlignError: the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        fail(
            "has no chat template, so no control tokens are known",
            where=f"the tokenizer {tokenizer.name_or_path}",
            hint="give a template with model.chat_template_path",
        )
    return list(chat_facts(tokenizer).written)
