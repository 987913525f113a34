"""PPO of other tools: TRL's PPOConfig (of 0.12 to 1.13, and PPOv2 before it), TRL's first one (up to 0.11), and
LLaMA-Factory's `stage: ppo`, which stands on that first one."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from align.translation import rules
from align.translation.rules import Changed, Joint, Lost, Rules, To
from align.translation.work import Work

FOLLOWS = "it follows from the batch sizes and the number of processes"
OWN_SCORE = "the reward model's folder says what it is"


def normalized(value: Any) -> Any:
    """A running mean and deviation have no counterpart; those of the first rollout have."""
    if value:
        return Changed("first", "by mean and deviation of the first rollout, not running ones")
    return Changed("none", "off: scores as they are")


def estimator(value: Any) -> Any:
    """`kl_penalty` of the first PPOConfig."""
    if value == "kl":
        return "k1"
    raise Lost(f"`{value}`: the penalty is `k1` or `k3`")


def whole_nucleus(value: Any) -> Any:
    """Log-probabilities know nothing of a cut distribution."""
    if value in (1, 1.0, None):
        raise Lost("1, as always here")
    raise Lost(f"{value}: PPO draws from the whole distribution, whose log-probabilities it uses")


def no_top_k(value: Any) -> Any:
    """The same for `top_k`."""
    if value in (0, 0.0, -1, None):
        raise Lost("off, as always here")
    raise Lost(f"{value}: PPO draws from the whole distribution, whose log-probabilities it uses")


def no_dropout(value: Any) -> Any:
    """Dropout makes the ratio of two probabilities noise."""
    if value:
        raise Lost(f"{value}: dropout makes the ratio of probabilities noise, and PPO has none")
    return value


def prompts_only(value: Any) -> Any:
    """Nothing is evaluated during PPO."""
    if value in ("no", False, None):
        raise Lost("nothing is evaluated during PPO")
    raise Lost("PPO's log shows every rollout; `align eval` is a stage of its own")


_COMMON: Rules = {
    "lora_dropout": To("lora.lora_dropout", no_dropout),
    "top_p": To("generation.top_p", whole_nucleus),
    "top_k": To("generation.top_k", no_top_k),
    "generation_kwargs": Joint(),
    "max_completion_length": To("generation.max_new_tokens"),
    "ref_model": rules.Drop("the reference is the model that the stage starts from"),
    **rules.extras("run_name tf32 ddp_timeout ddp_backend data_seed", "ppo"),
    **{
        key: To("trainer.eval_strategy", prompts_only)
        for key in ("eval_strategy", "evaluation_strategy")
    },
    **rules.drops(
        "eval_steps per_device_eval_batch_size eval_delay", "nothing is evaluated during PPO"
    ),
}

TRL: Rules = {
    **_COMMON,
    # the PPOConfig of 0.12 to 1.13, and PPOv2
    "gradient_accumulation_steps": Joint(),
    "num_mini_batches": Joint(),
    "sft_model_path": Joint(),
    "reward_model_path": To("scorer.reward_model"),
    "response_length": To("generation.max_new_tokens"),
    "max_new_tokens": To("generation.max_new_tokens"),
    "local_rollout_forward_batch_size": To("generation.generation_batch_size"),
    "non_eos_penalty": Joint(),
    "penalty_reward_value": Joint(),
    **rules.drops("stop_token stop_token_id", "an answer stops where its turn ends"),
    **rules.drops(
        "num_sample_generations eval_samples",
        "`sample_rollouts` says after how many rollouts samples are written",
    ),
    **rules.drops(
        "world_size num_total_batches micro_batch_size local_batch_size local_mini_batch_size"
        " backward_batch_size global_backward_batch_size global_batch_size",
        FOLLOWS,
    ),
    **rules.drops(
        "value_model_path", "the value starts as `value_init` says: reward model or zero"
    ),
    **rules.drops("ds3_gather_for_generation", "no ZeRO-3 in training stages so far"),
    **rules.drops("exp_name task_name", "`output_dir` is the run's name"),
    **rules.drops("model_adapter_name ref_adapter_name", "align names its adapters itself"),
    # the first PPOConfig, up to TRL 0.11
    "batch_size": Joint(),
    "mini_batch_size": Joint(),
    "model_name": To("model.model_name_or_path"),
    "query_dataset": To("data.dataset_name"),
    "reward_model": To("scorer.reward_model"),
    "steps": To("total_episodes"),
    "ppo_epochs": To("num_ppo_epochs"),
    "init_kl_coef": To("kl_coef"),
    "adap_kl_ctrl": Joint(),
    "target": Joint(),
    "horizon": Joint(),
    "kl_penalty": To("kl_estimator", estimator),
    "early_stopping": Joint(),
    "target_kl": Joint(),
    "score_clip": To("reward_clip"),
    "use_score_scaling": To("reward_normalization", normalized),
    "use_score_norm": Joint(),
    "log_with": To("trainer.report_to", rules.trackers),
    **rules.drops("forward_batch_size", "`generation.generation_batch_size` and the micro-batch"),
    **rules.drops(
        "ratio_threshold compare_steps optimize_cuda_cache optimize_device_cache is_peft_model"
        " is_encoder_decoder remove_unused_columns",
        "decided by align",
    ),
    **rules.drops(
        "tracker_kwargs tracker_project_name accelerator_kwargs project_kwargs"
        " push_to_hub_if_best_kwargs",
        "no counterpart",
    ),
}

LLAMAFACTORY: Rules = {
    **_COMMON,
    "reward_model": To("scorer.reward_model"),
    "ppo_epochs": To("num_ppo_epochs"),
    "ppo_buffer_size": To("num_mini_batches"),
    "ppo_target": To("kl_target"),
    "ppo_whiten_rewards": To("whiten_rewards"),
    "ppo_score_norm": To("reward_normalization", normalized),
    "max_new_tokens": To("generation.max_new_tokens"),
    "max_length": rules.Drop("`generation.max_new_tokens` bounds an answer"),
    "reward_model_type": Joint(),
    **rules.drops(
        "reward_model_adapters reward_model_quantization_bit reward_model_revision", OWN_SCORE
    ),
    **rules.drops(
        "num_beams repetition_penalty length_penalty skip_special_tokens", "PPO samples plainly"
    ),
}

TABLES: dict[str, Rules] = {
    "trl": TRL,
    "handbook": TRL,
    "llamafactory": LLAMAFACTORY,
    "axolotl": {},
}

OF_THE_FIRST = frozenset(
    {
        *("ppo_epochs", "init_kl_coef", "adap_kl_ctrl", "horizon", "model_name"),
        *("query_dataset", "score_clip", "steps", "use_score_norm", "use_score_scaling"),
        *("early_stopping", "kl_penalty", "forward_batch_size"),
    }
)
"""Keys that only the first PPOConfig has."""

PPO_V2 = frozenset({"non_eos_penalty", "penalty_reward_value"})
"""Keys that only PPOv2 has."""

SPLIT_SINCE = "0.17"
"""The version of TRL since which `num_mini_batches` divides a rollout; before, it multiplied one."""

PLAIN: dict[str, Any] = {
    "trainer.gradient_accumulation_steps": 1,
    "trainer.adam_epsilon": 1e-8,
    "num_ppo_epochs": 4,
    "num_mini_batches": 1,
    "reward_normalization": "none",
    "reward_clip": None,
    "missing_eos_penalty": None,
}
"""What all of them do, and we do otherwise."""

FIRST: dict[str, Any] = {**PLAIN, "kl_coef": 0.2, "value_model": "policy"}

DEFAULTS: dict[str, Mapping[str, Any]] = {
    "trl": {
        **PLAIN,
        "trainer.learning_rate": 3e-6,
        "generation.temperature": 0.7,
        "generation.max_new_tokens": 53,
        "generation.generation_batch_size": 64,
    },
    "first": {
        **FIRST,
        "trainer.learning_rate": 1.41e-5,
        "trainer.per_device_train_batch_size": 128,
        "total_episodes": 20000,
    },
    "llamafactory": {
        **FIRST,
        "kl_target": 6.0,
        "generation.temperature": 0.95,
        "generation.max_new_tokens": 1024,
    },
}


def is_first(work: Work) -> bool:
    """Whether a TRL file is for the first PPOConfig."""
    return bool(OF_THE_FIRST & set(work.given)) or work.given.get("mini_batch_size") is not None


def fill(work: Work, title: str) -> None:
    """Write their defaults out where ours are others."""
    tool = "llamafactory" if work.tool == "llamafactory" else "first" if is_first(work) else "trl"
    for ours, value in DEFAULTS[tool].items():
        work.add(ours, value, f"{title}'s default")
    rate = work.data.get("trainer.learning_rate")
    if tool == "trl" and rate is not None:
        work.add("value_learning_rate", rate, f"{title} trains both with one rate")
    if tool == "first" and "adap_kl_ctrl" not in work.given:
        work.add("kl_target", float(work.given.get("target") or 6.0), f"{title}'s default")


# --- keys that are read together ------------------------------------------------------------


def batches(work: Work) -> None:
    """Rollouts: in TRL a device's rollout is batch x accumulation, split into mini-batches; here it is batch x
    accumulation x mini-batches, as in PPOv2 and before TRL 0.17. The first PPOConfig says `batch_size` for
    the rollout."""
    given = work.given
    keys = ("gradient_accumulation_steps", "num_mini_batches", "batch_size", "mini_batch_size")
    accumulated = _count(given.get("gradient_accumulation_steps"))
    for key in keys:
        work.take(key)
    if is_first(work):
        rows = _count(given.get("mini_batch_size"), 128)
        if "mini_batch_size" in given:
            work.give("trainer.per_device_train_batch_size", rows, "mini_batch_size")
        if "gradient_accumulation_steps" in given:
            key = "gradient_accumulation_steps"
            work.give("trainer.gradient_accumulation_steps", accumulated, key)
        if "batch_size" in given:
            parts = max(_count(given["batch_size"]) // (rows * accumulated), 1)
            work.give("num_mini_batches", parts, "batch_size", "a rollout is that many steps")
        if "num_mini_batches" in given:
            work.say("num_mini_batches", "dropped", None, "`batch_size` says it")
        return
    for key in ("batch_size", "mini_batch_size"):
        if key in given:
            work.say(key, "dropped", None, FOLLOWS)
    parts, rows = (
        _count(given.get(key), default)
        for key, default in (("num_mini_batches", 1), ("per_device_train_batch_size", 8))
    )
    if "num_mini_batches" in given:
        work.give("num_mini_batches", parts, "num_mini_batches")
    older = bool(PPO_V2 & set(given))
    whole = rows * accumulated * (parts if older else 1)
    step = max(whole // parts, 1)
    micro = math.gcd(step, rows)
    reason = ""
    if parts > 1 and not older:
        reason = f"a step's; TRL counts those of a rollout (before {SPLIT_SINCE}: a step's too, so keep {accumulated})"
    if "gradient_accumulation_steps" in given or parts > 1:
        source = "gradient_accumulation_steps"
        source = source if source in given else "num_mini_batches"
        ours = "trainer.gradient_accumulation_steps"
        if source == "num_mini_batches":
            work.add(ours, step // micro, reason)
        else:
            work.give(ours, step // micro, source, reason)
    if micro != rows:
        work.take("per_device_train_batch_size")
        key = "per_device_train_batch_size"
        why = f"a rollout of {whole} in {parts} steps"
        if key in given:
            work.give(f"trainer.{key}", micro, key, why)
        else:
            work.add(f"trainer.{key}", micro, why)


def _count(value: Any, default: int = 1) -> int:
    whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return int(value) if whole else default


def policy(work: Work) -> None:
    """TRL's script starts policy and reference from `sft_model_path`, and takes the tokenizer of the other."""
    start = work.take("sft_model_path")
    if not start:
        work.say("sft_model_path", "dropped", None, "nothing is given")
        return
    work.give("model.model_name_or_path", start, "sft_model_path")
    other = work.take("model_name_or_path")
    if "model_name_or_path" in work.given:
        same = other == start
        reason = "the same as `sft_model_path`" if same else "the policy is `sft_model_path`"
        work.say("model_name_or_path", "dropped", None, reason)


def penalty(work: Work) -> None:
    """PPOv2: a fixed score for answers that never end."""
    on, score = work.take("non_eos_penalty"), work.take("penalty_reward_value")
    key = "penalty_reward_value" if "penalty_reward_value" in work.given else "non_eos_penalty"
    if on:
        score = -1.0 if score is None else score
        work.give("missing_eos_score", score, key, "the score of an answer that never ends")
    for name in ("non_eos_penalty", "penalty_reward_value"):
        if name in work.given and not (on and name == key):
            work.say(name, "dropped", None, "`missing_eos_score` says it" if on else "off")


def adaptive(work: Work) -> None:
    """The first PPOConfig's controller of the coefficient."""
    on = work.given.get("adap_kl_ctrl", True)
    for key in ("adap_kl_ctrl", "target", "horizon"):
        value = work.take(key)
        if key not in work.given:
            continue
        if not on:
            work.say(key, "dropped", None, "off: the coefficient is fixed")
        elif key == "adap_kl_ctrl":
            target = float(work.given.get("target") or 6.0)
            work.add("kl_target", target, "`adap_kl_ctrl` adapts the coefficient")
            work.say(key, "dropped", None, "on: `kl_target` says it")
        elif key == "target":
            work.data.pop("kl_target", None)
            work.notes = [note for note in work.notes if note.key != "kl_target"]
            work.give("kl_target", float(value), key)
        else:
            work.give("kl_horizon", int(value), key)


def stopping(work: Work) -> None:
    """The first PPOConfig leaves a rollout once the policy moved 1.5 times `target_kl`."""
    on, bound = work.take("early_stopping"), work.take("target_kl")
    if "early_stopping" in work.given:
        reason = "`target_kl` says it" if on else "off"
        work.say("early_stopping", "dropped", None, reason)
    if on:
        value = 1.5 * float(1.0 if bound is None else bound)
        key = "target_kl" if "target_kl" in work.given else "early_stopping"
        work.give("target_kl", value, key, "1.5 times it, where TRL stops")
    elif "target_kl" in work.given:
        work.say("target_kl", "dropped", None, "`early_stopping` is off")


def score_norm(work: Work) -> None:
    """`use_score_norm` only matters with `use_score_scaling`."""
    work.take("use_score_norm")
    work.say("use_score_norm", "dropped", None, "scores are centred wherever they are scaled")


def drawing(work: Work) -> None:
    """What of a generation config has a key here."""
    value = work.take("generation_kwargs")
    names = {"max_new_tokens": "max_new_tokens", "temperature": "temperature"}
    rest = []
    for name, item in value.items() if isinstance(value, Mapping) else ():
        if name in names:
            work.give(f"generation.{names[name]}", item, "generation_kwargs", quiet=True)
        else:
            rest.append(str(name))
    reason = f"without {', '.join(rest)}: PPO samples plainly" if rest else ""
    work.say("generation_kwargs", "moved", "generation", reason)


def scorer_kind(work: Work) -> None:
    """`api` means a server, which has no counterpart."""
    value = work.take("reward_model_type")
    reason = f"`{value}`: a server scores nothing here" if value == "api" else OWN_SCORE
    work.say("reward_model_type", "dropped", None, reason)


JOINT: dict[str, Callable[[Work], None]] = {
    **dict.fromkeys(
        ("gradient_accumulation_steps", "num_mini_batches", "batch_size", "mini_batch_size"),
        batches,
    ),
    "sft_model_path": policy,
    "non_eos_penalty": penalty,
    "penalty_reward_value": penalty,
    **dict.fromkeys(("adap_kl_ctrl", "target", "horizon"), adaptive),
    **dict.fromkeys(("early_stopping", "target_kl"), stopping),
    "use_score_norm": score_norm,
    "generation_kwargs": drawing,
    "reward_model_type": scorer_kind,
}
"""Key -> the function that reads it, in a PPO file."""
