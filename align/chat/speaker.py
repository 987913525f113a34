"""A model that answers in a chat: its prompt, its limit, and its answer in pieces as it comes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from align.chat.session import End, Messages, Reply
from align.config.sections import ModelSection
from align.data.rendering import render_prompt
from align.errors import fail
from align.generation.answers import stop_ids
from align.generation.sampler import stream_completion, unwrapped
from align.models.identity import check_base, look_at
from align.models.loading import check_vocabulary, load_placed, policy_section
from align.models.source import Source
from align.models.tokenizer import load_tokenizer

BASE = ""
"""The role of the base itself, where it shares its weights with an adapter."""
BESIDE_LORA = ("trainable_token_indices", "modules_to_save")
"""What an adapter may train beside its factors."""


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

    def __init__(
        self, name: str, model: Any, tokenizer: PreTrainedTokenizerBase, role: str | None = None
    ) -> None:
        """`role` is the adapter that answers where several share a base, `BASE` for none of them."""
        if tokenizer.chat_template is None:
            fail(
                "has no chat template, so it cannot chat",
                where=name,
                hint="name one with --chat-template (a file, `llama3`, `llama3.1`, `llama3.2`)",
            )
        check_vocabulary(model, tokenizer)
        self.name, self.model, self.tokenizer, self.role = name, model, tokenizer, role
        self.stops = stop_ids(model, tokenizer)
        self.limit: int | None = getattr(
            unwrapped(model).config.get_text_config(), "max_position_embeddings", None
        )

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
        on_token = self._listener(written, on_text)
        try:
            with self._in_role():
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

    def _listener(
        self, written: list[int], on_text: Callable[[str], None]
    ) -> Callable[[int], None]:
        """Collects tokens in `written`, and hands on their text as far as its characters are whole."""
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

        return on_token

    @contextmanager
    def _in_role(self) -> Iterator[None]:
        """The shared model as this speaker."""
        if self.role == BASE:
            with self.model.disable_adapter():
                yield
            return
        if self.role is not None:
            self.model.set_adapter(self.role, inference_mode=True)
        yield

    def _text(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip()


def load_speakers(
    names: Sequence[str],
    sources: Sequence[Source],
    *,
    in_4bit: bool | None = None,
    chat_template: str | None = None,
) -> list[Speaker]:
    """Load one model or two; two that stand on the same base share its weights.

    Args:
        names: what they are called.
        sources: where they lie.
        in_4bit: quantize the weights; as each run trained when None.
        chat_template: shipped template or Jinja file in place of the tokenizers' own.

    Raises:
        AlignError: no model there, a reward model, or no chat template.
    """
    sections = []
    for source in sources:
        values: dict[str, Any] = {
            "load_in_4bit": source.in_4bit if in_4bit is None else in_4bit,
            "chat_template_path": chat_template,
        }
        sections.append(policy_section(source.path, **values))
    try:
        if len(sections) == 2 and _share(*sections):
            return _shared(names, sections)
        return [
            Speaker(name, load_placed(section), load_tokenizer(section))
            for name, section in zip(names, sections, strict=True)
        ]
    except torch.OutOfMemoryError:
        fail(
            "the models do not fit into the GPU's memory",
            where=", ".join(names),
            hint="try --load-in-4bit",
        )


def _share(first: ModelSection, second: ModelSection) -> bool:
    """Whether two models are adapters of one base, or one of them is that base."""

    def base(section: ModelSection) -> tuple[Any, ...]:
        folder = Path(section.model_name_or_path).expanduser()
        place = folder.resolve() if folder.is_dir() else section.model_name_or_path
        return place, section.model_revision, section.load_in_4bit

    adapters = [section.adapter_name_or_path for section in (first, second)]
    if not any(adapters) or base(first) != base(second):
        return False
    configs = [look_at(adapter).config or {} for adapter in adapters if adapter]
    # PEFT cannot put an adapter without such parts beside one that has them.
    return all(configs[0].get(part) == configs[-1].get(part) for part in BESIDE_LORA)


def _shared(names: Sequence[str], sections: Sequence[ModelSection]) -> list[Speaker]:
    order = sorted((0, 1), key=lambda place: sections[place].adapter_name_or_path is None)
    model: Any = load_placed(sections[order[0]])
    roles = {order[0]: "default", order[1]: BASE}
    adapter = sections[order[1]].adapter_name_or_path
    if adapter is not None:
        roles[order[1]] = "second"
        base = sections[order[1]].model_name_or_path
        check_base(adapter, base, model.get_base_model().config.to_dict())
        model.load_adapter(adapter, adapter_name="second", autocast_adapter_dtype=False)
    return [
        Speaker(name, model, load_tokenizer(section), roles[place])
        for place, (name, section) in enumerate(zip(names, sections, strict=True))
    ]
