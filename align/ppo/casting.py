"""Who plays which role: from a recipe to policy, reference, value and reward, on one base where they fit."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedTokenizerBase

from align.errors import AlignError, fail
from align.generation.answers import Prompt, same_tokens
from align.generation.sampler import unwrapped
from align.models.adapters import expose_trained_head, lora_config
from align.models.identity import IDENTITY_FILE, check_base, look_at
from align.models.loading import check_vocabulary, load_policy, load_reward_model
from align.models.quick_lora import quicken
from align.models.tokenizer import load_tokenizer
from align.ppo.roles import POLICY, Roles, add_reward_adapter, silence_dropout
from align.ppo.scoring import Scorer, function_scorer, reward_model_scorer, weighted
from align.report.terminal import say
from align.stages.ppo import PPOConfig


def cast_roles(
    config: PPOConfig, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]
) -> Roles:
    """Load the policy and whatever shares its weights.

    Raises:
        AlignError: no model there, a prompt that leaves no room for an answer, or a value that cannot begin as asked.
    """
    policy: Any = load_policy(config.model, trained=True, train_base=not config.lora.use_peft)
    check_vocabulary(policy, tokenizer)
    check_room(policy, prompts, config.generation.max_new_tokens)
    roles = (
        _with_adapters(config, policy, tokenizer)
        if config.lora.use_peft
        else _with_full_weights(config, policy, tokenizer)
    )
    if config.generation.fold_adapter and roles.unmergeable is not None:
        fail(
            f"the adapter cannot be folded into the weights: {roles.unmergeable}",
            where="generation.fold_adapter: true",
            hint="leave fold_adapter out",
        )
    silence_dropout(roles)
    roles.eval()
    return roles


def check_room(policy: Any, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
    """Refuse prompts that leave no room for an answer of full length in the model's context."""
    limit = getattr(unwrapped(policy).config.get_text_config(), "max_position_embeddings", None)
    long = [p for p in prompts if limit is not None and len(p.ids) + max_new_tokens > limit]
    if long:
        worst = max(long, key=lambda prompt: len(prompt.ids))
        fail(
            f"{len(long)} of {len(prompts)} prompts with an answer of {max_new_tokens} tokens are longer than the "
            f"model's context of {limit} (the longest prompt has {len(worst.ids)} tokens)",
            where=f"data, {worst.where}",
            hint=_more_room(int(limit or 0) - max_new_tokens, len(worst.ids), int(limit or 0)),
        )


def _more_room(left: int, longest: int, limit: int) -> str:
    """The ways out where `left` positions are too few for a prompt of `longest` tokens."""
    fit = f" to {limit - longest}" if limit > longest else ""
    shorter = f"lower generation.max_new_tokens{fit}"
    if left < 1:
        return shorter
    drop = f"data.max_length: {left} with data.truncation_mode: drop"
    return f"{shorter}, or leave long prompts out: {drop}"


def _with_adapters(config: PPOConfig, policy: Any, tokenizer: PreTrainedTokenizerBase) -> Roles:
    if not config.model.continues_adapter:
        policy = get_peft_model(policy, lora_config(config.lora, tokenizer=tokenizer, model=policy))
    expose_trained_head(policy)
    critic = _critic(config, policy, tokenizer)
    roles = Roles(policy, value=critic)
    if critic is not None:
        roles.reward_on_value = True
        roles.reward_head = _head(critic)
    if config.model.continues_adapter:
        roles.add_adapter("ref", policy.peft_config[POLICY])
        roles.copy_adapter(POLICY, "ref")
    if critic is None:
        roles.reward_apart = _share_reward(config, roles, tokenizer)
    if config.value_model == "adapter" and critic is None:
        shared = roles.shares_reward
        like = deepcopy(policy.peft_config["reward"]) if shared else _value_lora(config)
        roles.add_adapter("value", like)
    quicken(policy)
    return roles


def _value_lora(config: PPOConfig) -> LoraConfig:
    """A value's adapter. Trained token rows are the policy's alone: they are for writing and reading its own turns."""
    found = lora_config(config.lora.model_copy(update={"trainable_token_indices": None}))
    assert found is not None
    return found


def _critic(config: PPOConfig, policy: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """A full reward model as frozen weights under a new adapter: with the adapter it is the value, without it the
    reward. None where the reward model is none, is an adapter, or reads other tokens than the policy writes."""
    path = config.scorer.reward_model
    wanted = config.value_model == "adapter" and config.value_init == "reward"
    if path is None or not wanted or not config.scorer.share_base:
        return None
    if look_at(path).kind != "reward":
        return None
    model, its_tokenizer = load_reward_model(path, config.model)
    if not same_tokens(tokenizer, its_tokenizer) or not isinstance(
        _head_of(model), torch.nn.Linear
    ):
        return None
    lora = _value_lora(config)
    lora.task_type, lora.exclude_modules = None, ["score"]
    critic = get_peft_model(model.requires_grad_(False), lora)
    quicken(critic)
    return critic


def _head_of(model: Any) -> Any:
    return getattr(unwrapped(model), "score", None)


def _head(model: Any) -> torch.Tensor:
    weight: torch.Tensor = _head_of(model).weight
    return weight.detach().reshape(-1).clone()


def _share_reward(
    config: PPOConfig, roles: Roles, tokenizer: PreTrainedTokenizerBase
) -> str | None:
    """Put the reward model on the policy's base if it is an adapter of that very base; else say why not."""
    path, model = config.scorer.reward_model, config.model
    if path is None:
        return "there is none"
    if not config.scorer.share_base:
        return "scorer.share_base is off"
    found = look_at(path)
    if found.kind != "reward_adapter":
        return "it is a full model"
    if model.adapter_name_or_path is not None and not model.continues_adapter:
        return "the policy's base is changed by an adapter that is folded into it"
    folder = _local(path)
    try:
        check_base(str(folder), model.model_name_or_path, unwrapped(roles.policy).config.to_dict())
        same = found.base == model.model_name_or_path or (folder / IDENTITY_FILE).is_file()
    except AlignError:
        same = False
    if not same:
        return f"its base is {found.base}"
    if not same_tokens(load_tokenizer(_tokens_of(folder, model)), tokenizer):
        return "its tokenizer or chat template is another one"
    return add_reward_adapter(roles, folder)


def _tokens_of(folder: Path, model: Any) -> Any:
    return model.model_copy(
        update={"adapter_name_or_path": str(folder), "tokenizer_name_or_path": None}
    )


def _local(path: str) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))


def _with_full_weights(config: PPOConfig, policy: Any, tokenizer: PreTrainedTokenizerBase) -> Roles:
    reference = deepcopy(policy).requires_grad_(False)
    value, head = None, None
    if config.value_model == "adapter":
        value, head = _value_model(config, policy, tokenizer)
    roles = Roles(policy, reference=reference, value=value)
    if head is not None:
        roles.reward_head = head
    return roles


def _value_model(
    config: PPOConfig, policy: Any, tokenizer: PreTrainedTokenizerBase
) -> tuple[Any, torch.Tensor | None]:
    """A full model for the value: the reward model's weights if it has the policy's shape and reads its tokens,
    else the policy's."""
    path = config.scorer.reward_model
    if config.value_init == "reward" and path is not None:
        model, its_tokenizer = load_reward_model(path)
        if isinstance(model, PeftModel):
            model = model.merge_and_unload()
        score = _head_of(model)
        same = model.config.hidden_size == policy.config.hidden_size
        same = same and model.config.vocab_size == policy.config.vocab_size
        if score is not None and same and same_tokens(tokenizer, its_tokenizer):
            head = _head(model)
            model.requires_grad_(True)
            score.requires_grad_(False)
            return model.to(policy.dtype), head
    return deepcopy(policy).requires_grad_(True), None


def make_scorer(
    config: PPOConfig,
    roles: Roles,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
) -> Scorer | None:
    """Everything that scores beside a reward model on the shared base; None where there is nothing else."""
    scorers: dict[str, tuple[Scorer, float]] = {}
    section = config.scorer
    if section.reward_model is not None and not roles.shares_reward:
        model = reward_model_scorer(
            section.reward_model, prompts, tokenizer, section.score_batch_size, config.model
        )
        scorers["reward model"] = (model, section.reward_model_weight)
    for name, weight in section.reward_funcs.items():
        scorers[name] = (function_scorer(name, prompts), weight)
    return weighted(scorers) if scorers else None


def say_casting(name: str, roles: Roles, config: PPOConfig) -> None:
    """One line: what sits on the shared base, and what has weights of its own."""
    if not roles.adapters:
        say(f"{name}: full fine-tuning; reference and value have weights of their own")
        wanted = config.scorer.reward_model is not None and config.value_init == "reward"
        if wanted and not roles.value_on_policy and roles.reward_head is None:
            say(
                f"{name}: the reward model has another shape or tokenizer, so the value starts from the policy's "
                "weights, at zero: critic_warmup_steps helps"
            )
        return
    on_base = ["policy", "reference"]
    on_base += ["value"] if "value" in roles.adapters else []
    on_base += ["value head"] if roles.value_on_policy else []
    on_base += ["reward"] if "reward" in roles.adapters else []
    if roles.reward_on_value:
        say(f"{name}: one base for {', '.join(on_base)}; another for reward and value")
        return
    own = config.scorer.reward_model is not None and not roles.shares_reward
    say(
        f"{name}: one base for {', '.join(on_base)}"
        + (f"; the reward model has weights of its own ({roles.reward_apart})" if own else "")
    )
    if own and config.value_init == "reward":
        say(f"{name}: the value starts at zero, not as the reward model: critic_warmup_steps helps")
