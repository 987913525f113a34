"""What looks like an access token, and this machine's own: shown nowhere, written nowhere."""

import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

HIDDEN = "<secret>"

SECRET = re.compile(
    r"(?<![\w-])(?:"
    r"(?:hf|api_org)_[A-Za-z0-9]{16,}"
    r"|gh[pousr]_[A-Za-z0-9]{16,}"
    r"|github_pat_\w{16,}"
    r"|sk-(?=[\w-]*\d)(?=[\w-]*[A-Z])[A-Za-z0-9_-]{20,}"
    r"|AKIA[A-Z0-9]{16})"
)
"""Keys of Hugging Face, GitHub, AWS, and those that begin with `sk-`: a path such as
`runs/task-specific` or `hf_checkpoints` is none of them."""

SECRET_NAME = r"[\w.-]*(?:(?:hub|access|auth|hf)[_-]?token|api[_-]?key|password|secret)"

SECRET_OPTION = re.compile(rf"(?i)(?<![\w.-])({SECRET_NAME}=)(\S+)")
"""From the beginning of a name on, or a long word would be read again from each of its letters."""

SECRET_FLAG = re.compile(rf"(?i)^--?{SECRET_NAME}$")

SECRET_KEY = re.compile(rf"(?i){SECRET_NAME}")

IN_ADDRESS = re.compile(r"(://[^/\s:@]*:)[^/\s@]+(?=@)")
"""The password of `https://user:password@host/`, as in the address of a git remote."""

VARIABLE = re.compile(
    r"(?i)(?!.*(?:PATH|FILE|DIR)$).*(?:^|_)"
    r"(?:TOKEN|PAT|API_?KEY|ACCESS_KEY|SECRET|SECRET_KEY|PRIVATE_KEY|PASSWORD|PASSWD|CREDENTIALS)(?:_|$)"
)
"""Names of environment variables whose value is a secret: HF_TOKEN, WANDB_API_KEY, ..."""

SHORTEST = 12
"""Characters from which such a value is one; a shorter one may be any word."""


@cache
def _names_a_secret(variable: str) -> bool:
    return VARIABLE.match(variable) is not None


@cache
def _stored(file: str) -> str:
    try:
        return Path(file).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, ValueError, RuntimeError):
        return ""


def own_secrets() -> Iterator[str]:
    """The secrets of this environment, and the token that `hf auth login` stored."""
    for name in os.environ:
        if _names_a_secret(name) and len(value := os.environ.get(name, "").strip()) >= SHORTEST:
            yield value
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    stored = _stored(os.environ.get("HF_TOKEN_PATH") or f"{home}/token")
    if len(stored) >= SHORTEST:
        yield stored


def holds_secret(text: str) -> bool:
    """Whether a text has an access token in it, by its form or because it is one of ours."""
    return SECRET.search(text) is not None or any(own in text for own in own_secrets())


def hide_tokens(text: str, instead: str = HIDDEN) -> str:
    """Text with our own secrets, and what has the form of an access token, replaced: nothing else changes."""
    if len(text) < SHORTEST:
        return text  # a word: most texts are
    for own in own_secrets():
        text = text.replace(own, instead)
    return SECRET.sub(instead, text)


def scrub(text: str) -> str:
    """Text with everything that looks like an access token replaced by `<secret>`, also what `password=` gives."""
    if "://" in text:
        text = IN_ADDRESS.sub(rf"\1{HIDDEN}", text)
    if "=" in text:
        text = SECRET_OPTION.sub(rf"\1{HIDDEN}", text)
    return hide_tokens(text)


def scrubbed(value: Any) -> Any:
    """Plain data without access tokens: in any text, and whatever stands at a key that names one."""
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, Mapping):
        return {
            key: HIDDEN if item and SECRET_KEY.fullmatch(str(key)) else scrubbed(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [scrubbed(item) for item in value]
    return value


def scrub_arguments(arguments: list[str]) -> list[str]:
    """A command line without access tokens, also where a flag and its value are two words."""
    shown: list[str] = []
    for argument in arguments:
        hidden = shown and SECRET_FLAG.match(shown[-1])
        shown.append(HIDDEN if hidden else scrub(argument))
    return shown
