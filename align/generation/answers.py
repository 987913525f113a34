"""Prompts, the answers sampled for them, and who scores the answers."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.config.sections import DataSection, ModelSection
from align.data.exact import TOOLS
from align.data.rendering import prompt_rows
from align.data.sequences import Renderer
from align.data.tool_use import shown
from align.errors import AlignError, Problem
from align.evaluation.judges import ask
from align.generation.pairing import as_completion
from align.generation.sampler import Completion, sample_completions, unwrapped
from align.generation.scoring import RewardScorer
from align.models.loading import inference_device, load_policy, load_reward_model
from align.models.tokenizer import end_of_turn_ids
from align.registry import resolve
from align.report.terminal import say
from align.runs import RunFolder


@dataclass(frozen=True, slots=True)
class Prompt:
    """A row of the data set that asks for an answer."""

    index: int
    """Its place in the data set."""
    ids: list[int]
    row: Mapping[str, Any]
    """Its columns, `prompt` (text or messages) among them."""

    @property
    def is_text(self) -> bool:
        """Whether it is plain text and no chat."""
        return isinstance(self.row["prompt"], str)

    @property
    def tools(self) -> list[dict[str, Any]] | None:
        """The functions that a chat offers."""
        return None if self.is_text else self.row.get(TOOLS)

    @property
    def where(self) -> str:
        """The row in words."""
        return f"row {self.index + 1}"


@dataclass(slots=True)
class Answer:
    """A sampled completion, its text, and what was found out about it."""

    text: str
    ids: list[int]
    """Its tokens, without the stop token."""
    stop_id: int | None
    """The token that ended it; None where it was cut at the limit."""
    verdict: dict[str, float] = field(default_factory=dict)
    """`score` and further parts."""
    kept: bool = False
    """Whether it became a demonstration."""

    @property
    def ended(self) -> bool:
        """Whether it ended by itself."""
        return self.stop_id is not None

    @property
    def all_ids(self) -> list[int]:
        """The tokens with the stop token, if there was one."""
        return self.ids if self.stop_id is None else [*self.ids, self.stop_id]


@dataclass(slots=True)
class Group:
    """A prompt's place and its answers, in the order of the samples."""

    index: int
    answers: list[Answer]


def stop_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer, the one that ends a turn in the chat template first."""
    own = getattr(unwrapped(model).generation_config, "eos_token_id", None)
    saved = [] if own is None else own if isinstance(own, list) else [own]
    return list(dict.fromkeys([*end_of_turn_ids(tokenizer), *saved]))


def closing_ids(tokenizer: PreTrainedTokenizerBase) -> dict[bool, Any]:
    """What training rows end in: chats (False) in an end of turn, plain texts (True) in an end of text."""
    return {False: end_of_turn_ids(tokenizer)[0], True: tokenizer.eos_token_id}


def draw(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    on_batch: Callable[[int, int], None] | None = None,
    **options: Any,
) -> list[Group]:
    """Sample answers to the prompts and decode them.

    Args:
        model: the policy.
        tokenizer: its tokenizer.
        prompts: rendered by that tokenizer.
        on_batch: progress, see `sample_completions`.
        **options: how many and how, as `sample_completions` takes them (`num_generations`,
            `max_new_tokens`, `temperature`, `top_p`, `top_k`, `batch_size`, `seed`).
    """
    drawn = sample_completions(
        model,
        [prompt.ids for prompt in prompts],
        stop_ids=stop_ids(model, tokenizer),
        pad_id=int(tokenizer.pad_token_id),
        indices=[prompt.index for prompt in prompts],
        on_batch=on_batch,
        **options,
    )
    texts = iter(
        tokenizer.batch_decode(
            [completion.ids for row in drawn for completion in row], skip_special_tokens=True
        )
    )
    return [
        Group(prompt.index, [_answer(next(texts), completion) for completion in row])
        for prompt, row in zip(prompts, drawn, strict=True)
    ]


def say_positions(name: str, model: Any, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
    """Warn where prompt and answer together may be longer than what the model was made for."""
    longest = max(len(prompt.ids) for prompt in prompts) + max_new_tokens
    limit = getattr(unwrapped(model).config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and longest > limit:
        say(
            f"{name}: warning: prompts and answers of up to {longest} tokens go beyond the "
            f"{limit} positions of the model: shorter answers (max_new_tokens) or prompts (data.max_length) fit",
            style="yellow",
        )


def _answer(text: str, completion: Completion) -> Answer:
    return Answer(text.strip(), completion.ids, completion.stop_id)


class RewardModel:
    """A reward model that scores answers to prompts."""

    def __init__(self, path: str, batch_size: int, like: ModelSection | None = None) -> None:
        """`like` gives the type and quantization of its weights."""
        model, self.tokenizer = load_reward_model(path, like)
        self.scorer = RewardScorer(model, self.tokenizer)
        self.batch_size = batch_size
        self.closing = closing_ids(self.tokenizer)

    def rewards(
        self,
        prompts: Sequence[Prompt],
        groups: Sequence[Group],
        tokenizer: PreTrainedTokenizerBase,
    ) -> list[list[float]]:
        """The reward of every answer; each is closed by the token that ends a turn (or a text).

        Args:
            prompts: the groups' prompts, in the same order.
            groups: answers of a policy.
            tokenizer: the policy's. Where the reward model's own differs from it, prompts and
                answers are rendered anew.
        """
        if same_tokens(tokenizer, self.tokenizer):
            sequences = [
                [*prompt.ids, *answer.ids, self.closing[prompt.is_text]]
                for prompt, group in zip(prompts, groups, strict=True)
                for answer in group.answers
            ]
        else:
            sequences = self._rendered(prompts, groups)
        rewards = iter(self.scorer.score(sequences, self.batch_size))
        return [[next(rewards) for _ in group.answers] for group in groups]

    def _rendered(self, prompts: Sequence[Prompt], groups: Sequence[Group]) -> list[list[int]]:
        rows = [
            (asked, [as_completion(asked, answer.text) for answer in group.answers])
            for asked, group in zip((p.row["prompt"] for p in prompts), groups, strict=True)
        ]
        sequences = []
        tools = [prompt.tools for prompt in prompts]
        answered = Renderer(self.tokenizer).answers(rows, tools=tools)
        for prompt, row in zip(prompts, answered, strict=True):
            if isinstance(row, Problem):
                raise AlignError(replace(row, where=prompt.where))
            sequences += [[*row.prompt_ids, *ids] for ids in row.completions]
        return sequences


def same_tokens(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers write the same ids for the same chat."""
    if first is second:
        return True
    templates = first.chat_template, second.chat_template
    return bool(templates[0] == templates[1] and first.get_vocab() == second.get_vocab())


def judge_answers(
    name: str, prompts: Sequence[Prompt], groups: Sequence[Group]
) -> list[list[dict[str, float]]]:
    """The verdict of a registered judge on every answer, whether it ended or not.

    Raises:
        AlignError: the judge failed or gave no finite `score`; the row is named.
    """
    judge = resolve("judge", name)
    return [
        [ask(judge, name, prompt.row, answer.text, prompt.where) for answer in group.answers]
        for prompt, group in zip(prompts, groups, strict=True)
    ]


def load_prompts(
    data: DataSection, tokenizer: PreTrainedTokenizerBase, folder: RunFolder | None = None
) -> list[Prompt]:
    """The rows of a stage's data as prompts; a run folder gets their origin."""
    rows = prompt_rows(data, tokenizer)
    if folder is not None:
        folder.data(rows)
    return [
        Prompt(index, row.pop("prompt_ids"), _plain(row))
        for index, row in enumerate(rows.train.to_list())
    ]


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row as judges read it and later stages render it: functions and calls as lists."""
    if isinstance(row["prompt"], str):
        return row
    made = row | {"prompt": [shown(turn) for turn in row["prompt"]]}
    if isinstance(row.get(TOOLS), str):
        made[TOOLS] = json.loads(row[TOOLS])
    return made


def load_for_answers(section: ModelSection) -> Any:
    """The model that a section names, with its adapter, ready to write on this process's device."""
    model: Any = load_policy(section)
    model.eval()
    quantized = getattr(model, "is_quantized", False)
    return model if quantized else model.to(inference_device())
