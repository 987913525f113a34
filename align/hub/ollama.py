"""The Modelfile of Ollama: a chat template as Go template, found by rendering small chats.

The pieces that a template writes around turns are read off rendered chats and put together again;
whatever does not give back the template's own text for every probe is refused.
"""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from align.errors import fail
from align.models.portable import PROBES
from align.models.tokenizer import render_text

SYSTEM, USER, ANSWER, AGAIN = "S1S", "U1U", "A1A", "U2U"

Chat = list[dict[str, str]]


@dataclass(frozen=True)
class Pieces:
    """What a chat template writes around the texts of a chat, without the begin-of-text token."""

    plain_start: str
    """In front of the first user's text, without a system text."""
    system_start: str
    """In front of the system text."""
    system_end: str
    """Between the system text and the first user's text."""
    user_end: str
    user_start: str
    """Between the end of an answer and the next user's text."""
    answer_start: str
    answer_end: str
    opening: str
    """What opens the answer that the model is to write."""

    def text(self, chat: Chat) -> str:
        """A chat with the generation prompt, put together from the pieces."""
        system = chat[0]["content"] if chat[0]["role"] == "system" else None
        turns = chat if system is None else chat[1:]
        out = self.plain_start if system is None else self.system_start + system + self.system_end
        for number, turn in enumerate(turns):
            if turn["role"] == "user":
                out += (self.user_start if number else "") + turn["content"] + self.user_end
            else:
                out += self.answer_start + turn["content"] + self.answer_end
        return out + self.opening


def find_pieces(tokenizer: PreTrainedTokenizerBase) -> Pieces:
    """Read the pieces off rendered chats, and prove that they give these chats back.

    Raises:
        AlignError: no chat template, or one that is not made of such pieces.
    """
    if tokenizer.chat_template is None:
        fail("has no chat template, so Ollama would not know a chat", where="align export")
    bos = tokenizer.bos_token or ""
    user, answer = {"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}
    again, system = {"role": "user", "content": AGAIN}, {"role": "system", "content": SYSTEM}

    def rendered(*chat: dict[str, str], opened: bool = False) -> str:
        text = render_text(tokenizer, [list(chat)], add_generation_prompt=opened)[0]
        return text.removeprefix(bos)

    try:
        plain_start, _, user_end = rendered(user).partition(USER)
        opening = rendered(user, opened=True).partition(USER)[2].removeprefix(user_end)
        middle = rendered(user, answer, again).partition(USER)[2].removeprefix(user_end)
        answer_start, _, rest = middle.partition(ANSWER)
        between = rest.partition(AGAIN)[0]
        answer_end = rendered(user, answer).partition(ANSWER)[2]
        system_start, _, after = rendered(system, user).partition(SYSTEM)
        pieces = Pieces(
            plain_start=plain_start,
            system_start=system_start,
            system_end=after.partition(USER)[0],
            user_end=user_end,
            user_start=between.removeprefix(answer_end),
            answer_start=answer_start,
            answer_end=answer_end,
            opening=opening,
        )
        for chat in PROBES:
            for probe in (chat, [system, *chat]):
                if pieces.text(probe) != rendered(*probe, opened=True):
                    raise ValueError("a chat comes out differently")
    except Exception as error:  # a template may raise anything of its own
        fail(
            f"its chat template cannot be written as a Go template ({error})",
            where="align export",
            hint="export with --format gguf: llama.cpp and its server read the template as it is",
        )
    return pieces


def go_template(pieces: Pieces) -> str:
    """The pieces as Ollama's TEMPLATE; Ollama itself writes the begin-of-text token.

    A last message of the assistant is left open, so that it is gone on with.
    """
    ends = (pieces.plain_start, pieces.system_end)
    if all(text.endswith(pieces.user_start) for text in ends):
        # Every user's turn begins alike: what stands before the first one is written once.
        plain, system_end = (text.removesuffix(pieces.user_start) for text in ends)
        head, user_start = _start(pieces.system_start, system_end, plain), _text(pieces.user_start)
    else:
        start = _start(pieces.system_start, pieces.system_end, pieces.plain_start)
        again = _text(pieces.user_start)
        head = "{{ $first := true }}"
        user_start = f"{{{{ if $first }}}}{start}{{{{ else }}}}{again}{{{{ end }}}}"
        user_start += "{{ $first = false }}"
    return (
        f"{head}{{{{ range $i, $_ := .Messages }}}}"
        "{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        f'{{{{ if eq .Role "user" }}}}{user_start}{{{{ .Content }}}}{_text(pieces.user_end)}'
        f"{{{{ if $last }}}}{_text(pieces.opening)}{{{{ end }}}}"
        f'{{{{ else if eq .Role "assistant" }}}}{_text(pieces.answer_start)}{{{{ .Content }}}}'
        f"{{{{ if not $last }}}}{_text(pieces.answer_end)}{{{{ end }}}}"
        "{{ end }}{{ end }}"
    )


def _start(before: str, behind: str, plain: str) -> str:
    """The system text between its pieces, or what stands in its place."""
    other = f"{{{{ else }}}}{_text(plain)}" if plain else ""
    return (
        f"{{{{ if $.System }}}}{_text(before)}{{{{ $.System }}}}{_text(behind)}{other}{{{{ end }}}}"
    )


def _text(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')


def modelfile(pieces: Pieces, stops: list[str], system: str | None) -> str:
    """The Modelfile of a folder with merged weights.

    Raises:
        AlignError: a text with three quotes or a quote at its end, or a stop with a quote or a line feed: a Modelfile
            cannot hold them.
    """
    template = go_template(pieces)
    for text, name in ((template, "the chat template"), (system or "", "the system text")):
        if '"""' in text or text.endswith('"'):
            held = 'holds """' if '"""' in text else "ends in a quote"
            hint = "export with --format gguf, or give another --system"
            fail(f"{name} {held}, and a Modelfile cannot", where="align export", hint=hint)
    for stop in stops:
        if '"' in stop or "\n" in stop:
            hint = "export with --format gguf: its readers take stops from the tokenizer"
            fail(f"a stop cannot stand in a Modelfile: {stop!r}", where="align export", hint=hint)
    lines = ["FROM .", f'TEMPLATE """{template}"""']
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    if system:
        lines.append(f'SYSTEM """{system}"""')
    return "\n".join(lines) + "\n"
