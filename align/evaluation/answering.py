"""The answers of every model that `align eval` compares, with what the divergence needs.

Models are in memory one at a time and each is loaded once: the reference comes last, so that it can
read the other models' answers. A stopped run goes on behind the draws that it had finished.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from align.config.sections import ModelSection
from align.durable import read_json, write_text
from align.errors import fail
from align.generation.answers import (
    Answer,
    Group,
    Prompt,
    draw,
    load_prompts,
    same_tokens,
    say_positions,
)
from align.generation.processes import gathered, in_shares
from align.generation.scoring import token_logprobs
from align.models.loading import load_any_policy
from align.models.tokenizer import load_tokenizer
from align.report.progress import Meter, progress
from align.runs import RunFolder
from align.stages.evaluate import EvalConfig

Logprobs = list[list[float]]


@dataclass(frozen=True)
class Setting:
    """One way of drawing answers."""

    temperature: float
    top_p: float = 1.0
    top_k: int = 0


PLAIN = Setting(1.0)
"""A model's own distribution, which its divergence is measured on."""


@dataclass
class Drawn:
    """Answers of one model in one setting, a group for each prompt."""

    groups: list[Group]
    seconds: float
    """Time of the draw."""
    own: Logprobs | None = None
    """The model's log-probabilities of the tokens of each first answer (in the setting `PLAIN`)."""
    reference: Logprobs | None = None
    """The reference's log-probabilities of the same tokens."""


@dataclass
class Answers:
    """What all models answered."""

    prompts: dict[str, list[Prompt]]
    """Model -> the prompts with that model's tokens."""
    tokenizers: dict[str, PreTrainedTokenizerBase]
    draws: dict[tuple[str, Setting], Drawn]


def setting_of(config: EvalConfig, temperature: float) -> Setting:
    """The setting of a temperature; to greedy answers top-p and top-k do not matter."""
    if temperature == 0:
        return Setting(0.0)
    return Setting(temperature, config.generation.top_p, config.generation.top_k)


def wanted(config: EvalConfig, name: str) -> dict[Setting, int]:
    """Setting -> answers per prompt that a model has to give."""
    counts = {setting_of(config, t): 1 for t in config.generation.temperatures}
    if config.reference not in (None, name):
        counts.setdefault(PLAIN, 1)
    if name in config.best_of:
        counts[setting_of(config, 1.0)] = config.best_of[name]
    return counts


def answer_all(config: EvalConfig, folder: RunFolder) -> Answers:
    """Let every model answer every prompt in every setting, and the reference read the answers."""
    answers = _prepared(config, folder)
    draws = answers.draws
    order = sorted(config.models, key=lambda name: name == config.reference)
    counts = {name: wanted(config, name) for name in order}
    total = sum(len(answers.prompts[name]) * len(counts[name]) for name in order)
    with progress(total, folder.name, unit="answers", quiet=folder.quiet) as meter:
        for name in order:
            others = [n for n in order if n != name and PLAIN in counts[n]]
            reads = name == config.reference and bool(others)
            missing = any((name, setting) not in draws for setting in counts[name])
            model = load_any_policy(config.models[name])[0] if missing or reads else None
            if model is not None and folder.is_main and not folder.quiet:
                limit = config.generation.max_new_tokens
                say_positions(f"{folder.name}: {name}", model, answers.prompts[name], limit)
            for number, (setting, count) in enumerate(counts[name].items()):
                if (name, setting) in draws:
                    meter.advance(len(answers.prompts[name]))
                    continue
                drawn = _draw(config, answers, name, model, setting, count, meter)
                draws[name, setting] = drawn
                path = folder.parts / f"model-{list(config.models).index(name)}-{number}.json"
                if folder.is_main:
                    write_text(path, json.dumps([name, asdict(setting), asdict(drawn)]))
            if reads:
                for other in others:
                    drawn = draws[other, PLAIN]
                    drawn.reference = _logprobs(config, model, answers.prompts[other], drawn.groups)
            del model
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return answers


def _prepared(config: EvalConfig, folder: RunFolder) -> Answers:
    """Tokenizers, prompts, and the draws of an earlier attempt."""
    tokenizers: dict[str, PreTrainedTokenizerBase] = {}
    prompts: dict[str, list[Prompt]] = {}
    for name, path in config.models.items():
        tokenizer = load_tokenizer(ModelSection(model_name_or_path=path))
        alike = [other for other in tokenizers if same_tokens(tokenizers[other], tokenizer)]
        if alike:
            prompts[name] = prompts[alike[0]]
        else:
            prompts[name] = load_prompts(config.data, tokenizer, None if tokenizers else folder)
        tokenizers[name] = tokenizer
    for name, tokenizer in tokenizers.items():
        if config.reference and not same_tokens(tokenizer, tokenizers[config.reference]):
            fail(
                f"`{name}` and the reference `{config.reference}` differ in their tokens or chat "
                "templates, so there is no divergence between them",
                where="reference",
                hint="leave `reference` out, or compare models of one family",
            )
    kept = [_read(path) for path in sorted(folder.parts.glob("*.json"))] if folder.is_main else []
    return Answers(prompts, tokenizers, dict(gathered(kept)))


def _read(path: Path) -> tuple[tuple[str, Setting], Drawn]:
    name, setting, drawn = read_json(path)
    groups = [
        Group(group["index"], [Answer(**answer) for answer in group["answers"]])
        for group in drawn["groups"]
    ]
    return (name, Setting(**setting)), Drawn(groups, drawn["seconds"], drawn["own"])


def _draw(
    config: EvalConfig,
    answers: Answers,
    name: str,
    model: Any,
    setting: Setting,
    count: int,
    meter: Meter,
) -> Drawn:
    started, before, tokenizer = time.monotonic(), meter.done, answers.tokenizers[name]
    prompts = answers.prompts[name]

    def work(share: list[Prompt]) -> list[Group]:
        return draw(
            model,
            tokenizer,
            share,
            num_generations=count,
            max_new_tokens=config.generation.max_new_tokens,
            batch_size=config.generation.generation_batch_size,
            seed=config.seed,
            on_batch=_shown(meter, before, count if setting.temperature else 1, len(prompts)),
            **asdict(setting),
        )

    groups = in_shares(prompts, work)
    meter.update(before + len(prompts))
    seconds = time.monotonic() - started
    own = None
    if setting == PLAIN and config.reference not in (None, name):
        own = _logprobs(config, model, prompts, groups)
    return Drawn(groups, seconds, own)


def _shown(meter: Meter, before: int, count: int, prompts: int) -> Callable[[int, int], None]:
    def show(completions: int, _: int) -> None:
        meter.update(before + min(prompts, completions // count))

    return show


def _logprobs(
    config: EvalConfig, model: Any, prompts: Sequence[Prompt], groups: Sequence[Group]
) -> Logprobs:
    """Log-probabilities under `model` of the tokens of each group's first answer."""

    def work(share: list[tuple[list[int], list[int]]]) -> Logprobs:
        return token_logprobs(
            model,
            [asked for asked, _ in share],
            [answered for _, answered in share],
            batch_size=config.generation.generation_batch_size,
        )

    pairs = [(p.ids, g.answers[0].all_ids) for p, g in zip(prompts, groups, strict=True)]
    return in_shares(pairs, work)
