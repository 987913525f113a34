"""A model that answers in a chat: its prompt, its limit, and its answer in pieces as it comes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from align.chat.session import End, Messages, Reply
from align.data.rendering import render_prompt
from align.errors import fail
from align.generation.answers import stop_ids
from align.generation.sampler import stream_completion, unwrapped
from align.models.loading import check_vocabulary, load_any_policy
from align.models.source import Source


@dataclass(frozen=True)
class Manner:
    """How answers are drawn."""

    temperature: float = 0.6
    top_p: float = 0.9
    top_k: int = 0
    max_new_tokens: int = 512
    seed: int = 0


class Speaker:
    """One model and its tokenizer.

    Its answers are those of `align sample` and `align eval`: the same rendering, every id that ends
    a turn as a stop, and draws that depend on the seed, the turn and the try alone.
    """

    def __init__(self, name: str, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.chat_template is None:
            fail(
                "has no chat template, so it cannot chat",
                where=name,
                hint="name one with --chat-template (a file, `llama3`, `llama3.1`, `llama3.2`)",
            )
        check_vocabulary(model, tokenizer)
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self.stops = stop_ids(model, tokenizer)
        self.limit: int | None = getattr(
            unwrapped(model).config.get_text_config(), "max_position_embeddings", None
        )

    @classmethod
    def load(
        cls, name: str, source: Source, *, in_4bit: bool = False, chat_template: str | None = None
    ) -> "Speaker":
        """Load a model from where it lies.

        Raises:
            AlignError: no model there, a reward model, or no chat template.
        """
        values: dict[str, Any] = {"load_in_4bit": True} if in_4bit else {}
        if chat_template is not None:
            values["chat_template_path"] = chat_template
        try:
            model, tokenizer = load_any_policy(source.path, **values)
        except torch.OutOfMemoryError:
            fail("does not fit into the GPU's memory", where=name, hint="try --load-in-4bit")
        return cls(name, model, tokenizer)

    def prompt(self, messages: Messages) -> list[int]:
        """The tokens of a chat up to where the answer begins; control tokens in it stay text.

        Raises:
            AlignError: the chat template refuses these turns, or there is no room for an answer.
        """
        ids = render_prompt(self.tokenizer, messages)
        if self.limit is not None and len(ids) >= self.limit:
            fail(
                f"the chat has {len(ids)} tokens, and the model reads {self.limit} at most; "
                "nothing was cut, and the turn was not asked",
                where=self.name,
                hint="/undo takes the last turn back, /reset begins anew; or ask more briefly",
            )
        return ids

    def answer(
        self,
        ids: list[int],
        manner: Manner,
        *,
        place: tuple[int, int],
        on_text: Callable[[str], None],
    ) -> Reply:
        """Answer a prompt; Ctrl-C keeps what has been written.

        Args:
            ids: the prompt's tokens.
            manner: how to draw.
            place: number of the turn and of the try.
            on_text: called with each piece of the answer as soon as its characters are complete.
        """
        room = manner.max_new_tokens
        if self.limit is not None:
            room = min(room, self.limit - len(ids))
        written: list[int] = []
        detokenizer = DecodeStream(skip_special_tokens=True)
        begun = False

        def on_token(token: int) -> None:
            nonlocal begun
            written.append(token)
            if token in self.stops:  # some of them are plain tokens
                return
            piece = detokenizer.step(self.tokenizer.backend_tokenizer, token) or ""
            piece = piece if begun else piece.lstrip()
            if piece:
                begun = True
                on_text(piece)

        try:
            done = stream_completion(
                self.model,
                ids,
                on_token,
                max_new_tokens=room,
                stop_ids=self.stops,
                pad_id=int(self.tokenizer.pad_token_id),
                temperature=manner.temperature,
                top_p=manner.top_p,
                top_k=manner.top_k,
                seed=manner.seed,
                place=place,
            )
        except KeyboardInterrupt:
            return Reply(self._text(written), "interrupted", len(written), len(ids))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            fail(
                "the GPU ran out of memory; the turn was not answered",
                where=self.name,
                hint="/reset makes the chat shorter; --load-in-4bit makes the model smaller",
            )
        cut: End = "length" if room == manner.max_new_tokens else "context"
        end: End = "stop" if done.ended else cut
        return Reply(self._text(done.ids), end, len(written), len(ids))

    def _text(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip()
