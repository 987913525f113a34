"""The trainer: transformers' own loop, in which every step is one update from the rollout at hand."""

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.modeling_layers import GradientCheckpointingLayer

from align.environment import world_size
from align.errors import fail
from align.generation.answers import Prompt
from align.ppo.alarms import Alarm, alarms
from align.ppo.casting import say_casting
from align.ppo.estimators import adapted_kl_coef, policy_loss, value_loss
from align.ppo.experience import Experience
from align.ppo.gradients import sum_over_processes
from align.ppo.records import LOGGED, write_samples
from align.ppo.roles import Roles
from align.ppo.rollout import Collector, Plan
from align.ppo.scoring import Scorer
from align.ppo.state import load_state, save_state
from align.report.terminal import say
from align.runs import RunFolder
from align.stages.ppo import PPOConfig
from align.training.arguments import ppo_arguments

EXACT = 1e-4
"""How far ratio and KL may be from 1 and 0 before the first update (float32; reduced precision: 0.05)."""


def episodes_per_rollout(config: PPOConfig) -> int:
    """Answers drawn between two sets of updates, over all processes."""
    trainer = config.trainer
    micro = trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps
    return micro * config.num_mini_batches * world_size()


def total_steps(config: PPOConfig, prompts: int) -> int:
    """Optimizer steps of a run."""
    if config.trainer.max_steps > 0 and config.total_episodes is None:
        return config.trainer.max_steps
    episodes = config.total_episodes or math.ceil(
        config.trainer.num_train_epochs * prompts * config.generation.num_generations
    )
    rollouts = math.ceil(episodes / episodes_per_rollout(config))
    return rollouts * config.num_ppo_epochs * config.num_mini_batches


class PPOTrainer(Trainer):  # type: ignore[misc]
    """Updates a policy and its value from rollouts of that policy (arXiv 1707.06347, as in 2203.02155).

    A row of the training data is the number of a micro-batch: the rollout, the pass over it, the minibatch and the
    episodes follow from it, so that a resumed run stands where it stood.
    """

    def __init__(
        self,
        config: PPOConfig,
        roles: Roles,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        scorer: Scorer | None,
        folder: RunFolder,
    ) -> None:
        arguments = ppo_arguments(config, folder.checkpoints)
        arguments.max_steps = total_steps(config, len(prompts))
        self.config, self.roles, self.folder, self.prompts = config, roles, folder, prompts
        self.per_rollout = episodes_per_rollout(config)
        self._check_sizes(len(prompts))
        self.accumulation = config.trainer.gradient_accumulation_steps
        self.micro_per_rollout = config.num_ppo_epochs * config.num_mini_batches * self.accumulation
        super().__init__(
            model=roles,
            args=arguments,
            train_dataset=range(arguments.max_steps * self.accumulation),
            data_collator=lambda rows: {"step": rows[0]},
        )
        if self.is_deepspeed_enabled:
            fail(
                "sums gradients itself, which DeepSpeed does not allow",
                where="launch.accelerate",
                hint="use `ddp`; LoRA, or QLoRA with model.load_in_4bit, makes large models fit",
            )
        wanted = GradientCheckpointingLayer if self.args.gradient_checkpointing else ()
        self._recomputed = [layer for layer in roles.modules() if isinstance(layer, wanted)]
        self.collector = Collector(
            config,
            roles,
            tokenizer,
            prompts,
            scorer,
            rank=self.args.process_index,
            precision=self.compute_loss_context_manager,
        )
        self.experience: Experience | None = None
        self.kl_coef = config.kl_coef
        self.history: list[dict[str, float]] = []
        self.raised: dict[str, int] = {}
        self.good: dict[str, Tensor] = {}
        self.good_rollout: int | None = None
        self.halted: str | None = None
        self.left_alone = False
        self._plan: tuple[tuple[int, int], Plan] | None = None
        self._logged: dict[str, list[float]] = defaultdict(list)
        self._sums: dict[str, float] = defaultdict(float)
        self._norms: dict[str, float] = {}
        self._total_train_tokens = 0
        if folder.is_main and not folder.quiet:
            say_casting(folder.name, roles, config)

    def _check_sizes(self, prompts: int) -> None:
        generations = self.config.generation.num_generations
        if self.per_rollout % (generations * world_size()):
            fail(
                f"a rollout of {self.per_rollout} episodes cannot be split into prompts with {generations} answers "
                f"each on {world_size()} processes",
                where="generation.num_generations",
                hint="batch size x accumulation x num_mini_batches must be a multiple of it",
            )
        if not prompts:
            fail("there are no prompts", where="data")

    # transformers' loop, where ours differs

    def compute_loss_context_manager(self) -> Any:
        """Mixed precision; transformers leaves it to the model's `forward`, which PPO never calls."""
        return self.accelerator.autocast()

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """One schedule for both groups; the policy's begins after the critic's warm-up."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        wait = self.config.critic_warmup_steps
        if wait and isinstance(scheduler, LambdaLR):
            shape = scheduler.lr_lambdas[0]
            scheduler.lr_lambdas[0] = lambda step: shape(max(0, step - wait))
        return scheduler

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The numbers of the micro-batches, the same ones on every process."""
        return DataLoader(
            self.train_dataset, batch_size=1, shuffle=False, collate_fn=self.data_collator
        )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Two groups, policy and value, each with its own learning rate and its own clipping."""
        self.optimizer: torch.optim.Optimizer | None
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, None)
            rate = self.args.learning_rate
            value_rate = self.config.value_learning_rate or 2 * rate
            decay = {"weight_decay": self.args.weight_decay}
            groups = [
                {"params": self.roles.policy_parameters(), "lr": rate, **decay},
                {"params": self.roles.value_parameters(), "lr": value_rate, **decay},
            ]
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def _clip_grad_norm(self, model: Any) -> Tensor:
        limit = self.args.max_grad_norm
        for name, group in (
            ("policy", self.roles.policy_parameters()),
            ("value", self.roles.value_parameters()),
        ):
            with_gradient = [p for p in group if p.grad is not None]
            norm = torch.nn.utils.clip_grad_norm_(with_gradient, limit) if with_gradient else 0.0
            self._norms[name] = float(norm)
            self._logged[f"grad_norm/{name}"].append(float(norm))
        return torch.tensor(math.hypot(*self._norms.values()))

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """One micro-batch: collect a rollout if it is the first one of it, then learn."""
        number, place = divmod(int(inputs["step"]), self.micro_per_rollout)
        if self.experience is None or self.experience.number != number:
            self._collect(number)
        if self.halted is not None:
            self.control.should_training_stop = True
            return torch.zeros((), device=self.args.device)
        started = time.perf_counter()
        per_epoch = self.config.num_mini_batches * self.accumulation
        epoch, rest = divmod(place, per_epoch)
        minibatch, micro = divmod(rest, self.accumulation)
        assert self.experience is not None
        plan = self._plan_of(self.experience, number, epoch)[minibatch]
        tokens = sum(
            len(self.experience.episodes[e].completion_ids)
            for share in plan
            for part in share
            for e in part
        )
        self._check_exact(epoch, minibatch)
        loss = self._learn(self.experience, plan[self.args.process_index][micro], tokens)
        if micro == self.accumulation - 1:
            self._finish_update(tokens, first=(epoch, minibatch) == (0, 0))
        self._sums["update_seconds"] += time.perf_counter() - started
        return loss * world_size()  # transformers takes the mean over the processes

    def _plan_of(self, experience: Experience, number: int, epoch: int) -> Plan:
        if self._plan is None or self._plan[0] != (number, epoch):
            plan = self.collector.plan(experience.episodes, number, epoch)
            self._plan = (number, epoch), plan
        return self._plan[1]

    # collecting

    def _collect(self, number: int) -> None:
        update_seconds = self._sums.pop("update_seconds", 0.0)
        self.roles.eval()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        started = time.perf_counter()
        self.experience, found = self.collector.collect(number, self.per_rollout, self.kl_coef)
        found["generate_seconds"] = self.collector.generate_seconds
        found["score_seconds"] = time.perf_counter() - started - found["generate_seconds"]
        found["update_seconds"] = update_seconds
        self.left_alone = False
        self.history.append(found)
        self._total_train_tokens = int(sum(one["tokens"] for one in self.history))
        self._watch(found)
        self._note_rollout(found)
        if self.config.kl_target is not None:
            self.kl_coef = adapted_kl_coef(
                self.kl_coef,
                found["kl"],
                self.config.kl_target,
                self.per_rollout,
                self.config.kl_horizon,
            )

    def _watch(self, found: dict[str, float]) -> None:
        raised = alarms(self.history, self.config.alarms)
        for alarm in raised:
            if alarm.name not in self.raised:
                self.raised[alarm.name] = int(found["rollout"])
                self._say_alarm(alarm, found)
        stopping = [alarm for alarm in raised if alarm.name in self.config.alarms.stop_on]
        if stopping:
            self.halted = stopping[0].name
        elif self.config.alarms.stop_on:  # an alarm that may not stop the run makes no policy bad
            self.good_rollout = int(found["rollout"])
            self.good = {
                name: weight.cpu().clone()
                for name, weight in self.roles.trained_state().items()
                if name.startswith("policy.")
            }

    def _say_alarm(self, alarm: Alarm, found: dict[str, float]) -> None:
        line = {"alarm": alarm.name, "reason": alarm.reason, "remedy": alarm.remedy}
        self.folder.log(line | {"rollout": found["rollout"]}, step=self.state.global_step)
        if self.folder.is_main and not self.folder.quiet:
            say(
                f"{self.folder.name}: alarm `{alarm.name}` at rollout {found['rollout']}: {alarm.reason}. "
                f"Way out: {alarm.remedy}.",
                style="yellow",
            )

    def _note_rollout(self, found: dict[str, float]) -> None:
        for key, name in LOGGED.items():
            self._logged[name].append(found[key])
        e = self.experience
        if e is not None and self.folder.is_main and e.number % self.config.sample_rollouts == 0:
            write_samples(self.folder.path / "samples.jsonl", e, self.prompts)

    # learning

    def _check_exact(self, epoch: int, minibatch: int) -> None:
        """Before any update the policy is the reference: the KL of the first rollout is 0."""
        e = self.experience
        assert e is not None
        if self.state.global_step or epoch or minibatch:
            return
        gap = float(((e.logprobs - e.reference) * e.mask).abs().max())
        if gap > self._allowed():
            fail(
                f"policy and reference differ by up to {gap:.3g} nats before the first update",
                where="ppo",
                hint="check model_name_or_path, adapter_name_or_path and adapter_mode: the reference is the model "
                "that the stage starts from",
            )

    def _allowed(self) -> float:
        weights = next(self.roles.policy.parameters())
        full = weights.dtype is torch.float32 and self.accelerator.mixed_precision == "no"
        return EXACT if full else 0.05

    def _learn(self, e: Experience, places: list[int], tokens: int) -> Tensor:
        """Gradients of one micro-batch; every loss is a mean over the tokens of the whole minibatch."""
        roles, forward = self.roles, self.collector.forward
        roles.eval()
        for layer in self._recomputed:  # the flag of the layer alone wakes no dropout inside
            layer.training = True
        flat = forward.batch([e.episodes[place] for place in places], roles.device)
        known = self.collector.kept.pop(tuple(places), None)
        rows = torch.tensor(places)
        inside = e.mask[rows].bool()

        def of(values: Tensor) -> Tensor:
            return values[rows][inside].to(roles.device)

        warming = self.state.global_step < self.config.critic_warmup_steps
        moves = not (warming or self.left_alone)
        total = torch.zeros((), device=roles.device)
        with ExitStack() as stack:
            stack.enter_context(forward.attending(roles.policy))
            if moves or roles.value_on_policy:
                with roles.playing("policy") as model:
                    with self.compute_loss_context_manager():
                        logprobs, _, states = forward.completions(
                            model, flat, entropy=False, known=known
                        )
                        loss = torch.zeros((), device=roles.device)
                        if moves:
                            loss = loss + self._policy_part(logprobs, of, tokens)
                        else:  # not even by the value's gradient, nor by Adam's momentum
                            states = states.detach()
                        if roles.value_on_policy:
                            value = self._value_part(roles.values(states), of, tokens)
                            loss = loss + self.config.vf_coef * value
                    loss.backward()
                total = total + loss.detach()
        if not roles.value_on_policy:
            with roles.playing("value") as model, forward.attending(model):
                with self.compute_loss_context_manager():
                    states = forward.hidden(model, flat)[flat.rows]
                    value = self._value_part(roles.values(states), of, tokens)
                value.backward()
            total = total + value.detach()
        return total

    def _policy_part(self, logprobs: Tensor, of: Any, tokens: int) -> Tensor:
        e, config = self.experience, self.config
        assert e is not None
        part = policy_loss(
            logprobs,
            of(e.logprobs),
            of(e.advantages),
            low=config.cliprange,
            high=config.cliprange_high or config.cliprange,
            dual_clip=config.dual_clip,
        )
        sums = self._sums
        sums["policy"] += float(part.loss.detach())
        sums["clipped"] += float(part.clipped)
        sums["approx_kl"] += float(part.approx_kl)
        sums["ratio"] += float(part.ratio.sum())
        sums["ratio_low"] = min(sums.get("ratio_low", 1.0), float(part.ratio.min()))
        sums["ratio_high"] = max(sums.get("ratio_high", 1.0), float(part.ratio.max()))
        sums["policy_tokens"] += len(logprobs)
        return part.loss / tokens

    def _value_part(self, values: Tensor, of: Any, tokens: int) -> Tensor:
        e = self.experience
        assert e is not None
        loss = value_loss(values, of(e.values), of(e.returns), self.config.cliprange_value)
        self._sums["value"] += float(loss.detach())
        return loss / tokens

    def _finish_update(self, tokens: int, *, first: bool) -> None:
        """Before the optimizer's step: add up the gradients of all processes, and the figures of the minibatch."""
        self._sum_gradients()
        sums = self._summed()
        if sums.get("policy_tokens"):
            count = sums["policy_tokens"]
            approx_kl = sums["approx_kl"] / count
            found = {
                "loss/policy_avg": sums["policy"] / count,
                "policy/clipfrac_avg": sums["clipped"] / count,
                "policy/approxkl_avg": approx_kl,
                "val/ratio": sums["ratio"] / count,
                "val/ratio_min": sums["ratio_low"],
                "val/ratio_max": sums["ratio_high"],
            }
            for name, value in found.items():
                self._logged[name].append(value)
            if first:
                self._check_ratio(sums)
            target = self.config.target_kl
            if target is not None and approx_kl > target:
                self.left_alone = True
        self._logged["loss/value_avg"].append(sums["value"] / tokens)
        self._logged["policy/left_alone"].append(float(self.left_alone))

    def _check_ratio(self, sums: dict[str, float]) -> None:
        gap = max(1 - sums["ratio_low"], sums["ratio_high"] - 1)
        if gap > self._allowed():
            fail(
                f"the first update of a rollout sees ratios up to {gap:.3g} away from 1, so its gradient is not the "
                "policy's",
                where="ppo",
                hint="set model.attn_implementation: eager, or bf16: false, and report it",
            )

    def _sum_gradients(self) -> None:
        if world_size() == 1:
            return
        trained = [*self.roles.policy_parameters(), *self.roles.value_parameters()]
        sum_over_processes([weight.grad for weight in trained if weight.grad is not None])

    def _summed(self) -> dict[str, float]:
        """The sums of this minibatch over all processes; they begin anew."""
        seconds = self._sums.pop("update_seconds", 0.0)
        own, self._sums = dict(self._sums), defaultdict(float, update_seconds=seconds)
        if world_size() == 1:
            return defaultdict(float, own)
        from accelerate.utils import gather_object

        found: dict[str, float] = defaultdict(float)
        for one in gather_object([own]):
            for name, value in one.items():
                if name == "ratio_low":
                    found[name] = min(found.get(name, 1.0), value)
                elif name == "ratio_high":
                    found[name] = max(found.get(name, 1.0), value)
                else:
                    found[name] += value
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """transformers' figures with the means of ours since the last time."""
        means = {name: sum(values) / len(values) for name, values in self._logged.items() if values}
        self._logged.clear()
        if "loss" in logs:
            logs = {**logs, **means, "num_tokens": self._total_train_tokens}
            logs["episode"] = len(self.history) * self.per_rollout
            drawn = logs["episode"] / self.config.generation.num_generations
            logs["epoch"] = drawn / len(self.prompts)
        super().log(logs, start_time)

    # checkpoints

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            save_state(self, Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_state(self, Path(resume_from_checkpoint))

    def close(self) -> None:
        """After training: the last good policy where an alarm ended the run, and the figures for the summary."""
        if self.halted is not None and self.good:
            own = self.roles.trained_state()
            with torch.no_grad():
                for name, weight in self.good.items():
                    own[name].copy_(weight)
        last, folder = self.history[-1], self.folder
        folder.note("episodes", len(self.history) * self.per_rollout)
        for key in ("score", "reward", "kl", "length", "eos_rate", "explained_variance"):
            folder.note(key, last[key])
        if self.raised:
            folder.note("alarms", self.raised)
        if self.halted is not None:
            folder.note("stopped_by", self.halted)
            number = self.good_rollout
            kept = "the last one: none was there before the alarm"
            folder.note("kept_policy", kept if number is None else f"of rollout {number}")
