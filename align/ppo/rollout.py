"""Collecting experience: draw answers, score them, look at them with every model, estimate advantages."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from align.environment import world_size
from align.errors import AlignError, Problem, fail
from align.generation.answers import Prompt, closing_ids, stop_ids
from align.generation.sampler import sample_completions
from align.ppo import estimators
from align.ppo.experience import Episode, Experience, rows_of
from align.ppo.forward import Forward
from align.ppo.roles import Roles
from align.ppo.scoring import Scorer
from align.report.terminal import say
from align.stages.ppo import PPOConfig
from align.training.flat import Flat, can_flatten
from align.training.logprobs import HeadPass

Item = TypeVar("Item")

Plan = list[list[list[list[int]]]]
"""Episodes of an update by minibatch, process and micro-batch."""


def prompt_places(
    number: int, per_rollout: int, prompts: int, seed: int, *, shuffled: bool
) -> list[tuple[int, int]]:
    """The prompts of a rollout: (place in the stream, place in the data set).

    The stream is one shuffled pass over the prompts after the other, so that where a run stands follows from
    the number of the rollout alone.
    """
    found = []
    orders: dict[int, Any] = {}
    for place in range(number * per_rollout, (number + 1) * per_rollout):
        epoch, inside = divmod(place, prompts)
        if epoch not in orders:
            generator = np.random.default_rng([seed, epoch])
            orders[epoch] = generator.permutation(prompts) if shuffled else np.arange(prompts)
        found.append((place, int(orders[epoch][inside])))
    return found


def update_plan(
    lengths: Sequence[int],
    *,
    minibatches: int,
    processes: int,
    micro_batch: int,
    seed: Sequence[int],
    by_length: bool = False,
) -> Plan:
    """Which episodes are learned from in which minibatch, process and micro-batch of one pass.

    The minibatches depend on the seed alone and not on the number of processes.

    Args:
        lengths: of the episodes; their number is a multiple of all the others together.
        seed: of the order (run, rollout, pass).
        by_length: sort a minibatch by length, so that micro-batches hold like lengths; it is dealt out like cards, so
            that the processes of a micro-batch have like loads.
    """
    order = np.random.default_rng(list(seed)).permutation(len(lengths)).tolist()
    size = len(lengths) // minibatches
    plan: Plan = []
    for first in range(0, len(order), size):
        mini = order[first : first + size]
        if by_length:
            mini = sorted(mini, key=lambda place: (lengths[place], place))
            shares = [mini[process::processes] for process in range(processes)]
        else:
            share = size // processes
            shares = [mini[start : start + share] for start in range(0, size, share)]
        plan.append(
            [
                [one[at : at + micro_batch] for at in range(0, len(one), micro_batch)]
                for one in shares
            ]
        )
    return plan


def gathered(items: list[Item]) -> list[Item]:
    """The items of all processes, in the order of the processes."""
    if world_size() == 1:
        return items
    found: list[Item] = gather_object(items)
    return found


def gathered_from(work: Callable[[], list[Item]]) -> list[Item]:
    """What `work` gives in all processes, in their order.

    Where it fails in one process, all of them raise, so that none waits for the one that gave up.
    """
    if world_size() == 1:
        return work()
    items: list[Item] = []
    own: Exception | None = None
    problems: tuple[Problem, ...] = ()
    try:
        items = work()
    except AlignError as error:
        own, problems = error, error.problems
    except Exception as error:
        own, problems = (
            error,
            (Problem(f"another process failed: {type(error).__name__}: {error}"),),
        )
    told = gather_object([problems])
    if own is not None:
        raise own
    if any(told):
        raise AlignError(*dict.fromkeys(problem for one in told for problem in one))
    return gathered(items)


class Collector:
    """Makes rollouts. Every process draws and scores its share and gets the whole."""

    def __init__(
        self,
        config: PPOConfig,
        roles: Roles,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        scorer: Scorer | None,
        *,
        rank: int,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.config, self.roles, self.tokenizer, self.prompts = config, roles, tokenizer, prompts
        self.scorer, self.rank, self.precision = scorer, rank, precision
        self.forward = Forward(roles.policy, config.generation.temperature)
        self.stops = stop_ids(roles.policy, tokenizer)
        self.closing = closing_ids(tokenizer)
        self.settled = False
        self.generate_seconds = 0.0
        self.reward_mean, self.reward_deviation = 0.0, 1.0
        self.kept: dict[tuple[int, ...], HeadPass] = {}
        """Passes of the head over the micro-batches of the first minibatch, by their episodes: the first update
        sees the very same states."""

    def plan(self, episodes: Sequence[Episode], number: int, epoch: int) -> Plan:
        """The order of the updates of a rollout in one pass over it."""
        return update_plan(
            [len(episode.completion_ids) for episode in episodes],
            minibatches=self.config.num_mini_batches,
            processes=world_size(),
            micro_batch=self.config.trainer.per_device_train_batch_size,
            seed=(self.config.trainer.seed, number, epoch),
            by_length=self.config.trainer.train_sampling_strategy == "group_by_length",
        )

    def draw(self, number: int, episodes: int) -> list[Episode]:
        """Sample answers of the present policy, `num_generations` to each prompt of this rollout."""
        generation, trainer = self.config.generation, self.config.trainer
        places = prompt_places(
            number,
            episodes // generation.num_generations,
            len(self.prompts),
            trainer.seed,
            shuffled=trainer.train_sampling_strategy != "sequential",
        )
        share = len(places) // world_size()
        mine = places[self.rank * share : (self.rank + 1) * share]
        merging = generation.fold_adapter
        merge = self.roles.can_merge() if merging is None else merging
        folded = self.roles.merged() if merge else nullcontext()
        with torch.no_grad(), self.roles.playing("policy"), self.precision(), folded:
            drawn = sample_completions(
                self.roles.policy,
                [self.prompts[row].ids for _, row in mine],
                max_new_tokens=generation.max_new_tokens,
                stop_ids=self.stops,
                pad_id=int(self.tokenizer.pad_token_id),
                num_generations=generation.num_generations,
                temperature=generation.temperature,
                batch_size=generation.generation_batch_size,
                seed=trainer.seed,
                indices=[place for place, _ in mine],
            )
        found = []
        for (_, row), completions in zip(mine, drawn, strict=True):
            texts = self.tokenizer.batch_decode(
                [completion.ids for completion in completions], skip_special_tokens=True
            )
            for completion, text in zip(completions, texts, strict=True):
                ids = self.prompts[row].ids
                found.append(Episode(row, ids, completion.all_ids, completion.ended, text.strip()))
        return gathered(found)

    def collect(
        self, number: int, episodes: int, kl_coef: float
    ) -> tuple[Experience, dict[str, float]]:
        """A whole rollout with advantages, and its summary in numbers."""
        started = time.perf_counter()
        drawn = self.draw(number, episodes)
        self.generate_seconds = time.perf_counter() - started
        plan = self.plan(drawn, number, 0)
        mine = [micro for mini in plan for micro in mini[self.rank]]
        order = gathered([place for micro in mine for place in micro])
        found = gathered_from(lambda: self._scores(drawn, mine))
        scores = torch.zeros(len(order))
        scores[torch.tensor(order)] = torch.tensor(found)
        if not self.settled:
            self._start(drawn, scores)
        looks = self._look(drawn, mine, order, first=len(plan[0][self.rank]))
        experience = Experience(number, drawn, scores=scores, **looks)
        return experience, self.estimate(experience, kl_coef)

    def _start(self, episodes: list[Episode], scores: Tensor) -> None:
        """What the first rollout fixes: the way through the models, the reward's scale, the value's start."""
        with torch.no_grad(), self.roles.playing("policy"), self.precision():
            left = self.forward.settle(self.roles.policy, episodes[:2])
        if self.forward.padded or self.forward.own_logits:
            way = "whole logits" if self.forward.own_logits else "padded batches"
            if self.rank == 0:
                say(f"ppo: log-probabilities come from {way} (they differ by {left:.2g})")
        # The value's architecture may need padding where the policy's does not.
        if self.roles.value is not None:
            self.forward.padded |= not can_flatten(self.roles.value)
        if self.config.reward_normalization == "first":
            self.reward_mean = float(scores.mean())
            deviation = float(scores.std()) if len(scores) > 1 else 0.0
            # Equal scores (a rare reward that nobody earned yet), or a single one, have no scale.
            self.reward_deviation = deviation if deviation > 1e-6 else 1.0
        if self.config.value_init == "reward":
            self.roles.start_value_from_reward(
                self.reward_mean, self.reward_deviation, self.config.scorer.reward_model_weight
            )
        self.settled = True

    def _scores(self, episodes: list[Episode], mine: list[list[int]]) -> list[float]:
        """Raw scores of this process's episodes, in the order of its micro-batches."""
        places = [place for micro in mine for place in micro]
        found = [0.0] * len(places)
        if self.roles.shares_reward:
            weight = self.config.scorer.reward_model_weight
            rewards = [
                reward for micro in mine for reward in self._reward([episodes[at] for at in micro])
            ]
            found = [weight * reward for reward in rewards]
        if self.scorer is not None:
            more = self.scorer([episodes[place] for place in places])
            found = [one + other for one, other in zip(found, more, strict=True)]
        if not all(np.isfinite(found)):
            where = self.prompts[episodes[places[int(np.argmin(np.isfinite(found)))]].prompt].where
            fail("the reward is no finite number", where=where, hint="check the reward model")
        return found

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _reward(self, episodes: list[Episode]) -> list[float]:
        """The shared reward model's, read at the token that ends the turn, which every text is closed by."""
        closed = [
            Episode(
                e.prompt,
                e.prompt_ids,
                [*e.answer_ids, self.closing[self.prompts[e.prompt].is_text]],
                True,
                e.text,
            )
            for e in episodes
        ]
        flat = self.forward.batch(closed, self.roles.device)
        with self.roles.playing("reward") as model, self.precision():
            rewards: list[float] = self.roles.rewards(
                self.forward.hidden(model, flat)[flat.last]
            ).tolist()
        return rewards

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _look(
        self, episodes: list[Episode], mine: list[list[int]], order: list[int], *, first: int
    ) -> dict[str, Tensor]:
        """Log-probabilities, reference, entropy and values of every token, [E, T] each, and the mask.

        Args:
            first: micro-batches of the first minibatch.
        """
        self.kept.clear()
        names = ("logprobs", "reference", "entropy", "values")
        columns: dict[str, list[Tensor]] = {name: [] for name in names}
        for number, micro in enumerate(mine):
            flat = self.forward.batch([episodes[place] for place in micro], self.roles.device)
            keep = tuple(micro) if number < first else None
            for name, found in zip(names, self._models(flat, keep), strict=True):
                columns[name].append(found.float().cpu())
        lengths = [len(episodes[place].completion_ids) for place in order]
        width = max(lengths)
        back = torch.tensor(order).argsort()
        found = {
            name: rows_of(gathered(parts), lengths, width)[back] for name, parts in columns.items()
        }
        found["mask"] = (torch.arange(width) < torch.tensor(lengths)[back][:, None]).float()
        return found

    def _models(
        self, flat: Flat, keep: tuple[int, ...] | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        roles, forward = self.roles, self.forward
        with roles.playing("policy") as model, self.precision():
            known = None if keep is None else forward.first_pass(model, flat)
            if keep is not None and known is not None:
                self.kept[keep] = known
                logprobs, entropy, rows = known.logprobs, known.entropies, known.hidden
            else:
                logprobs, entropy, rows = forward.completions(model, flat)
            assert entropy is not None
            values = roles.values(rows) if roles.value_on_policy else None
        with roles.playing("reference") as model, self.precision():
            reference = forward.completions(model, flat, entropy=False)[0]
        if values is None:
            with roles.playing("value") as model, self.precision():
                values = roles.values(forward.hidden(model, flat)[flat.rows])
        return logprobs, reference, entropy, values

    def estimate(self, experience: Experience, kl_coef: float) -> dict[str, float]:
        """Fill in rewards, advantages and returns, and sum the rollout up."""
        config, e = self.config, experience
        normal = (e.scores - self.reward_mean) / self.reward_deviation
        clip = config.reward_clip
        rewards = normal if clip is None else normal.clamp(-clip, clip)
        ended = torch.tensor([episode.ended for episode in e.episodes])
        if config.missing_eos_score is not None:
            rewards = torch.where(
                ended, rewards, torch.full_like(rewards, config.missing_eos_score)
            )
        elif config.missing_eos_penalty is not None:
            rewards = torch.where(ended, rewards, rewards - config.missing_eos_penalty)
        kl = estimators.kl_estimates(e.logprobs, e.reference, config.kl_estimator) * e.mask
        per_token = estimators.token_rewards(rewards, kl, e.mask, kl_coef)
        if config.whiten_rewards:
            per_token = estimators.whiten(per_token, e.mask, shift_mean=False)
        lam: float | Tensor = config.lam
        if config.lam_length_alpha is not None:
            lam = estimators.length_adaptive_lambda(e.mask, config.lam_length_alpha)
        advantages = estimators.gae(per_token, e.values, e.mask, gamma=config.gamma, lam=lam)
        of_value = advantages
        if config.lam_value is not None:
            of_value = estimators.gae(
                per_token, e.values, e.mask, gamma=config.gamma, lam=config.lam_value
            )
        e.returns = (of_value + e.values) * e.mask
        e.rewards = rewards
        e.advantages = (
            estimators.whiten(advantages, e.mask) if config.whiten_advantages else advantages
        )
        clipped = torch.zeros(len(normal)) if clip is None else (normal.abs() >= clip).float()
        return summary(e, kl_coef) | {"clipped_scores": float(clipped.mean())}


def summary(e: Experience, kl_coef: float) -> dict[str, float]:
    """A rollout in numbers: means over its episodes; KL and entropy in nats."""
    k1 = estimators.kl_estimates(e.logprobs, e.reference, "k1") * e.mask
    k3 = estimators.kl_estimates(e.logprobs, e.reference, "k3") * e.mask
    tokens = float(e.mask.sum())
    texts = [episode.text for episode in e.episodes]
    return {
        "rollout": e.number,
        "score": float(e.scores.mean()),
        "score_deviation": float(e.scores.std(correction=0)),
        "reward": float(e.rewards.mean()),
        "kl": float(k1.sum(1).mean()),
        "kl_k3": float(k3.sum(1).mean()),
        "kl_per_token": float(k3.sum()) / tokens,
        "kl_coef": kl_coef,
        "entropy": float((e.entropy * e.mask).sum()) / tokens,
        "length": float(e.lengths.mean()),
        "eos_rate": sum(episode.ended for episode in e.episodes) / len(e.episodes),
        "unique_rate": len(set(texts)) / len(texts),
        "value": float(estimators.masked_mean(e.values, e.mask)),
        "return": float(estimators.masked_mean(e.returns, e.mask)),
        "explained_variance": estimators.explained_variance(e.values, e.returns, e.mask),
        "tokens": tokens,
    }
