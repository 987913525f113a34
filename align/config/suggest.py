""" "Did you mean ...?" for keys and values: spelling first, then the words of other tools."""

from collections.abc import Iterable
from difflib import SequenceMatcher

CUTOFF = 0.6
"""Least likeness of a suggestion (`difflib` ratio)."""

OTHER_WORDS = {
    "dtype": "torch_dtype model_dtype precision",
    "warmup_steps": "warmup_ratio warmup num_warmup_steps",
    "max_length": "max_seq_length max_seq_len seq_length cutoff_len sequence_len model_max_length",
    "datasets": "dataset_mixture dataset_mixer data_mix mixture",
    "eval_strategy": "evaluation_strategy",
    "learning_rate": "lr",
    "num_train_epochs": "epochs n_epochs num_epochs epoch",
    "per_device_train_batch_size": "batch_size train_batch_size micro_batch_size bs bsz"
    " per_device_batch_size per_gpu_train_batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "gradient_accumulation_steps": "grad_accum gradient_accumulation accumulation_steps",
    "lora_r": "lora_rank rank r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_target_modules": "target_modules lora_target",
    "lora_modules_to_save": "modules_to_save",
    "train_sampling_strategy": "group_by_length shuffle sampler",
    "lr_scheduler_type": "lr_scheduler scheduler schedule",
    "optim": "optimizer",
    "weight_decay": "wd",
    "load_in_4bit": "quantization quantize qlora load_in_4_bit",
    "load_in_8bit": "load_in_8_bit",
    "model_name_or_path": "model model_path model_name base_model model_id pretrained",
    "tokenizer_name_or_path": "tokenizer tokenizer_name tokenizer_path",
    "adapter_name_or_path": "adapter adapter_path peft_model peft_model_id lora_path",
    "dataset_name": "dataset name dataset_path train_file data_path data_files",
    "dataset_config": "dataset_config_name subset",
    "dataset_train_split": "split train_split dataset_split",
    "test_split_size": "val_size val_set_size eval_split_ratio test_size",
    "max_new_tokens": "max_tokens max_completion_length response_length",
    "num_generations": "num_return_sequences num_samples k n best_of_n samples_per_prompt",
    "beta": "kl_coef dpo_beta pref_beta",
    "output_dir": "output out save_dir run_dir",
    "attn_implementation": "flash_attention use_flash_attention_2 attn attention flash_attn",
    "max_grad_norm": "grad_clip gradient_clipping clip_grad",
    "logging_steps": "log_steps log_every",
    "save_steps": "save_every checkpoint_steps save_freq",
    "num_processes": "nproc num_gpus n_gpus nproc_per_node world_size gpus",
    "accelerate": "accelerate_config config_file fsdp deepspeed",
    "label_smoothing": "label_smoothing_factor",
    "loss_type": "loss dpo_loss",
    "use_peft": "peft use_lora finetuning_type",
    "gradient_checkpointing": "activation_checkpointing",
    "assistant_only_loss": "train_on_inputs completion_only_loss mask_prompt",
    "reward_model": "reward_model_path rm reward_model_name_or_path",
    "columns": "column_mapping field_mapping",
    "seed": "data_seed random_seed",
    "report_to": "logger trackers",
    "repo_id": "hub_model_id hub_repo_id hf_repo_id repository",
}
"""Our key -> what other tools, or older versions of TRL and transformers, call it."""

_OURS = {word: ours for ours, words in OTHER_WORDS.items() for word in words.split()}

GONE = {
    "max_prompt_length": "`data.max_length` bounds prompt and completion together",
    "overwrite_output_dir": "a finished run is never overwritten; choose another `output_dir`",
    "trust_remote_code": "align runs no code from repositories; leave it out",
    "push_to_hub": "`hub.repo_id: ORG/NAME` pushes the complete run; leave `push_to_hub` out",
    "hub_model_revision": "it is `hub.revision` here, beside `hub.repo_id: ORG/NAME`",
    "hub_revision": "it is `hub.revision` here, beside `hub.repo_id: ORG/NAME`",
    "hub_private_repo": "a push is private unless `hub.public: true`",
    "hub_strategy": "a run is pushed once, when it is complete (`hub.repo_id: ORG/NAME`)",
    "hub_always_push": "a run is pushed once, when it is complete (`hub.repo_id: ORG/NAME`)",
    "hub_token": "a token has no place in a recipe: `hf auth login`, or set HF_TOKEN",
    "do_train": "leave it out",
    "do_eval": "set `trainer.eval_strategy` to evaluate during training",
    "fp16": "set `trainer.bf16` (float16 training is not supported)",
    "save_strategy": "checkpoints are saved by `trainer.save_steps`",
    "logging_strategy": "metrics are logged by `trainer.logging_steps`",
    "resume_from_checkpoint": "the same command goes on from the newest complete checkpoint",
}
"""Keys of other tools that have no counterpart -> what to do instead."""


def _plain(word: str) -> str:
    return word.lower().replace("-", "_")


def likeness(first: str, second: str) -> float:
    """How alike two words are, 0 to 1, whatever their case and hyphens."""
    matcher = SequenceMatcher(None, _plain(first), _plain(second), autojunk=False)
    return matcher.ratio() if matcher.quick_ratio() >= CUTOFF else 0.0


def nearest(word: str, candidates: Iterable[str], cutoff: float = CUTOFF) -> str | None:
    """The candidate that is spelled most like `word`; None where none comes near."""
    scored = [(likeness(word, candidate), candidate) for candidate in candidates]
    best = max(scored, default=(0.0, ""), key=lambda pair: pair[0])
    return best[1] if best[0] >= cutoff else None


def nearest_key(key: str, known: Iterable[str]) -> str | None:
    """The dotted key of `known` that was probably meant by the unknown dotted `key`.

    The last part decides: another tool's word for it, the same name in another section, or the
    nearest spelling, where the same section wins among equals.
    """
    names = list(known)
    section, _, leaf = key.rpartition(".")
    leaf = _plain(leaf)
    ours = _OURS.get(leaf, leaf)
    if any(name.rpartition(".")[2] == ours for name in names):
        leaf = ours

    def score(name: str) -> float:
        other_section, _, other_leaf = name.rpartition(".")
        near = likeness(leaf, other_leaf)
        if len(leaf) > 3 and other_leaf.startswith(leaf):
            near = max(near, CUTOFF) + 0.1  # a name that was cut short
        return near + 0.1 * likeness(section, other_section) if near >= CUTOFF else 0.0

    best = max(names, key=score, default=None)
    return best if best is not None and score(best) >= CUTOFF else None


def advice(key: str, known: Iterable[str], *, words: str = "did you mean `{}`?") -> str | None:
    """The hint for an unknown key: what it is called here, or what to do instead."""
    gone = GONE.get(_plain(key.rpartition(".")[2]))
    if gone is not None:
        return gone
    found = nearest_key(key, known)
    return words.format(found) if found else None
