"""A chat so far: its turns, what each model is asked next, and the file it can be saved to. Light."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from align.errors import fail

End = Literal["stop", "length", "context", "interrupted"]
"""How an answer came to its end: by itself, at `--max-new-tokens`, at the model's context limit, by Ctrl-C."""

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Reply:
    """An answer as the model wrote it (nothing in it is made harmless yet)."""

    text: str
    end: End
    tokens: int
    """Tokens written, the stop token included."""
    prompt_tokens: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "text": self.text,
            "end": self.end,
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
        }


@dataclass
class Turn:
    """What the user said, and what each model answered."""

    user: str
    replies: dict[str, Reply] = field(default_factory=dict)
    tries: int = 1
    """How often it was answered: every try draws other tokens."""


class Session:
    """The turns of a chat with one or two models; each model sees its own answers only."""

    def __init__(self, systems: Mapping[str, str | None]) -> None:
        """`systems` gives each model's system text, in the order of the columns."""
        self.systems = dict(systems)
        self.turns: list[Turn] = []

    @property
    def names(self) -> list[str]:
        """The models."""
        return list(self.systems)

    def messages(self, name: str, asked: str | None = None) -> Messages:
        """The chat as one model sees it, with the turn that it is to answer."""
        found: Messages = []
        system = self.systems[name]
        if system:
            found.append({"role": "system", "content": system})
        for turn in self.turns:
            reply = turn.replies.get(name)
            if reply is None or not reply.text:
                continue
            found.append({"role": "user", "content": turn.user})
            found.append({"role": "assistant", "content": reply.text})
        if asked is not None:
            found.append({"role": "user", "content": asked})
        return found

    def reset(self) -> None:
        """Forget the turns; the system texts stay."""
        self.turns.clear()

    def undo(self) -> Turn | None:
        """Take the last turn back and return it; None in a chat without turns."""
        return self.turns.pop() if self.turns else None

    def save(self, file: Path) -> int:
        """Write the chat as rows of `messages`, one for each model; returns the number of turns.

        Raises:
            AlignError: nothing to save, the file is there already, or it cannot be written.
        """
        rows = [self._row(name) for name in self.names]
        if not self.turns:
            fail("there is nothing to save yet", where="/save")
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        try:
            with file.expanduser().open("x", encoding="utf-8") as handle:
                handle.write(text)
        except FileExistsError:
            fail(
                "is there already, and nothing is overwritten",
                where=str(file),
                hint="choose another name",
            )
        except OSError as error:
            fail(f"cannot be written: {error.strerror}", where=str(file))
        return len(self.turns)

    def _row(self, name: str) -> dict[str, Any]:
        return {"messages": self.messages(name), "model": name}


def conversation_json(user: str, replies: Mapping[str, Reply]) -> str:
    """One turn as a line of JSON, for scripts."""
    answers = {name: reply.as_dict() for name, reply in replies.items()}
    return json.dumps({"user": user, "answers": answers}, ensure_ascii=False)


def in_words(reply: Reply) -> str | None:
    """What a reader has to know of an answer that did not end by itself."""
    if reply.end == "length":
        return f"cut after {reply.tokens} tokens (--max-new-tokens)"
    if reply.end == "context":
        total = reply.prompt_tokens + reply.tokens
        return f"cut: the chat fills the model's context of {total} tokens; /undo or /reset"
    if reply.end == "interrupted":
        return "stopped by Ctrl-C"
    return None if reply.text else "an empty answer"
