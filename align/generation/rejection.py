"""Rejection sampling: answers are drawn and scored, the best are kept and become training rows."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.environment import world_size
from align.generation.answers import (
    Group,
    Prompt,
    RewardModel,
    draw,
    judge_answers,
    load_for_answers,
    say_positions,
)
from align.generation.pairing import as_completion, offered, ranking
from align.generation.processes import gathered, in_shares
from align.generation.samples import PartFiles
from align.report.progress import Meter, progress
from align.runs import RunFolder
from align.stages.sample import PairsSection, SampleConfig

Row = dict[str, Any]


class ScoredSampler:
    """Draws answers and has them scored; policy and scorer stay in memory."""

    def __init__(self, config: SampleConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.model = load_for_answers(config.model)
        path = config.scorer.reward_model
        self.reward_model = RewardModel(path, config.scorer.score_batch_size) if path else None

    def groups(
        self, prompts: Sequence[Prompt], on_batch: Callable[[int, int], None] | None = None
    ) -> list[Group]:
        """Scored answers to the prompts, in their order; every process draws its share of them."""

        def work(share: list[Prompt]) -> list[Group]:
            groups = self._draw(share, on_batch)
            for group, verdicts in zip(groups, self._verdicts(share, groups), strict=True):
                for answer, verdict in zip(group.answers, verdicts, strict=True):
                    answer.verdict = verdict
            return groups

        return in_shares(prompts, work)

    def _draw(
        self, prompts: Sequence[Prompt], on_batch: Callable[[int, int], None] | None
    ) -> list[Group]:
        generation = self.config.generation
        return draw(
            self.model,
            self.tokenizer,
            prompts,
            num_generations=generation.num_generations,
            max_new_tokens=generation.max_new_tokens,
            temperature=generation.temperature,
            top_p=generation.top_p,
            top_k=generation.top_k,
            batch_size=generation.generation_batch_size,
            seed=self.config.seed,
            on_batch=on_batch,
        )

    def _verdicts(
        self, prompts: Sequence[Prompt], groups: Sequence[Group]
    ) -> list[list[dict[str, float]]]:
        if self.reward_model is None:
            return judge_answers(str(self.config.scorer.judge), prompts, groups)
        rewards = self.reward_model.rewards(prompts, groups, self.tokenizer)
        return [[{"score": reward} for reward in row] for row in rewards]


def draw_missing(
    config: SampleConfig,
    folder: RunFolder,
    tokenizer: PreTrainedTokenizerBase,
    parts: PartFiles,
) -> None:
    """Draw, score and write the parts that are not there yet, each in one step."""
    missing = gathered(parts.missing() if folder.is_main else [])
    if not missing:
        return
    sampler = ScoredSampler(config, tokenizer)
    if folder.is_main and not folder.quiet:
        everything = [prompt for part in parts.parts for prompt in part]
        say_positions(folder.name, sampler.model, everything, config.generation.max_new_tokens)
    total = sum(map(len, parts.parts))
    done = total - sum(len(parts.parts[number]) for number in missing)
    tokens = 0
    with progress(total, folder.name, done=done, quiet=folder.quiet) as meter:
        for number in missing:
            prompts, started = parts.parts[number], time.monotonic()
            groups = sampler.groups(prompts, _onwards(meter, config, done, tokens))
            if folder.is_main:
                _keep(groups, config.pairs)
                parts.write(number, groups)
            answers = [answer for group in groups for answer in group.answers]
            written = sum(len(answer.all_ids) for answer in answers)
            done, tokens = done + len(prompts), tokens + written
            score = sum(answer.verdict["score"] for answer in answers) / len(answers)
            meter.update(done, tokens=tokens, score=score)
            seconds = time.monotonic() - started
            facts = {"prompts": done, "completions": len(answers), "tokens": written}
            rate = {"tokens_per_second": written / seconds, "score": score}
            folder.log({"part": number} | facts | rate)


def _onwards(
    meter: Meter, config: SampleConfig, done: int, tokens: int
) -> Callable[[int, int], None]:
    """Shows a part's progress; the other processes are taken to be as far as this one."""

    def show(completions: int, written: int) -> None:
        prompts = completions * world_size() // config.generation.num_generations
        meter.update(min(done + prompts, meter.total), tokens=tokens + written * world_size())

    return show


def _keep(groups: Sequence[Group], pairing: PairsSection) -> None:
    for group in groups:
        keep_best(
            group,
            count=pairing.keep_best,
            min_score=pairing.min_score,
            only_finished=pairing.only_finished,
        )


def keep_best(group: Group, *, count: int, min_score: float | None, only_finished: bool) -> None:
    """Mark the best distinct answers of a group as kept."""
    candidates = [
        {"text": answer.text, "score": answer.verdict["score"], "answer": answer}
        for answer in group.answers
        if answer.ended or not only_finished
    ]
    for candidate in ranking(candidates)[:count]:
        good = min_score is None or candidate["score"] >= min_score
        candidate["answer"].kept = good and bool(candidate["text"])


def demonstrations(prompts: Sequence[Prompt], groups: Sequence[Group]) -> list[Row]:
    """The kept answers as rows for SFT, the best of each prompt first."""
    rows = []
    for prompt, group in zip(prompts, groups, strict=True):
        kept = [answer for answer in group.answers if answer.kept]
        for answer in sorted(kept, key=lambda answer: -answer.verdict["score"]):
            rows.append(demonstration(prompt.row["prompt"], answer.text) | offered(prompt.row))
    return rows


def demonstration(prompt: Any, text: str) -> Row:
    """One row for SFT: messages, or prompt and completion where the prompt is plain text."""
    if isinstance(prompt, str):
        return {"prompt": prompt, "completion": text}
    return {"messages": [*prompt, *as_completion(prompt, text)]}


def rule_groups(
    prompts: Sequence[Prompt], groups: Sequence[Group], *, only_finished: bool
) -> list[Row]:
    """The groups as a pair rule reads them; empty answers are left out."""
    return [
        {
            "row": dict(prompt.row),
            "completions": [
                {"text": answer.text, "score": answer.verdict["score"], "ended": answer.ended}
                for answer in group.answers
                if answer.text and (answer.ended or not only_finished)
            ],
        }
        for prompt, group in zip(prompts, groups, strict=True)
    ]
