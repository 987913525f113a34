"""axolotl: flat YAML with `base_model`, `adapter`, `rl` and a list of typed data sets."""

from typing import Any

from align.translation import rules, trl_rules
from align.translation.rules import Changed, Joint, Lost, Rules, To


def on_as(name: str) -> Any:
    """A switch that stands for a value."""

    def change(value: Any) -> Any:
        if value:
            return name
        raise Lost("off")

    return change


def every_linear(value: Any) -> Any:
    """`lora_target_linear: true`."""
    if value:
        return "all-linear"
    raise Lost("off")


def whole_sequence(value: Any) -> Any:
    """`train_on_inputs` is the opposite of our mask."""
    return not value


def scheduler(value: Any) -> Any:
    """axolotl's own schedules have no counterpart."""
    if value in ("one_cycle", "rex", "log_sweep"):
        return Changed("cosine", f"transformers has no `{value}`")
    return value


def optimizer(value: Any) -> Any:
    """Optimizers by transformers' names."""
    own = ("muon", "came_pytorch", "optimi_adamw", "ao_adamw_fp8", "lion_pytorch", "dion")
    if value in own:
        return Changed("adamw_torch", f"transformers has no `{value}`")
    return rules.optimizer(value)


RULES: Rules = {
    **trl_rules.RULES,
    "base_model": To("model.model_name_or_path"),
    "revision_of_model": To("model.model_revision"),
    "tokenizer_config": To("model.tokenizer_name_or_path"),
    "lora_model_dir": To("model.adapter_name_or_path"),
    "adapter": Joint(),
    "rl": Joint(),
    "reward_model": Joint(),
    "datasets": Joint(),
    "test_datasets": Joint(),
    "chat_template": Joint(),
    "chat_template_jinja": Joint(),
    "default_system_message": To("data.system_prompt"),
    "lora_target_linear": To("lora.lora_target_modules", every_linear),
    "peft_use_dora": To("lora.use_dora"),
    "peft_use_rslora": To("lora.use_rslora"),
    "sequence_len": To("data.max_length"),
    "sample_packing": To("data.packing"),
    "val_set_size": To("data.test_split_size", rules.not_zero),
    "train_on_inputs": To("data.assistant_only_loss", whole_sequence),
    "dataset_processes": To("data.dataset_num_proc"),
    "micro_batch_size": To("trainer.per_device_train_batch_size"),
    "eval_batch_size": To("trainer.per_device_eval_batch_size"),
    "num_epochs": To("trainer.num_train_epochs"),
    "optimizer": To("trainer.optim", optimizer),
    "lr_scheduler": To("trainer.lr_scheduler_type", scheduler),
    "bf16": To("trainer.bf16", rules.flag),
    "flash_attention": To("model.attn_implementation", on_as("flash_attention_2")),
    "sdp_attention": To("model.attn_implementation", on_as("sdpa")),
    "eager_attention": To("model.attn_implementation", on_as("eager")),
    "rl_beta": To("beta"),
    "dpo_beta": To("beta"),
    "dpo_label_smoothing": To("label_smoothing"),
    "use_wandb": Joint(),
    **rules.drops(
        "model_type tokenizer_type is_llama_derived_model is_mistral_derived_model tokenizer_use_fast"
        " processor_type",
        "classes are found from the checkpoint",
    ),
    **rules.drops(
        "special_tokens tokens added_tokens_overrides",
        "the tokenizer and its chat template say what ends a turn",
    ),
    **rules.drops(
        "dataset_prepared_path push_dataset_to_hub dataset_keep_in_memory skip_prepare_dataset"
        " shuffle_merged_datasets dataset_exact_deduplication",
        "align keeps no cache of prepared rows",
    ),
    **rules.drops(
        "pad_to_sequence_len eval_sample_packing sample_packing_group_size sample_packing_bin_size"
        " batch_flattening multipack_real_batches",
        "batches are padded to their longest row, or packed",
    ),
    **rules.drops(
        "wandb_project wandb_entity wandb_watch wandb_name wandb_run_id wandb_log_model wandb_mode"
        " mlflow_tracking_uri mlflow_experiment_name comet_project_name",
        "trackers read their own environment variables (WANDB_PROJECT, ...)",
    ),
    **rules.drops("evals_per_epoch", "evaluation is by `trainer.eval_steps` or once per epoch"),
    **rules.drops("saves_per_epoch", "checkpoints are saved by `trainer.save_steps`"),
    **rules.drops(
        "strict plugins early_stopping_patience xformers_attention s2_attention flash_optimum"
        " lora_fan_in_fan_out gptq unfrozen_parameters liger_rope liger_rms_norm liger_glu_activation"
        " liger_layer_norm liger_fused_linear_cross_entropy liger_swiglu lora_mlp_kernel lora_qkv_kernel"
        " lora_o_kernel peft_layers_to_transform relora_steps eval_table_size eval_max_new_tokens"
        " loss_watchdog_threshold loss_watchdog_patience gc_steps noisy_embedding_alpha"
        " auto_resume_from_checkpoints roles_to_train train_on_eos resize_token_embeddings_to_32x"
        " loraplus_lr_ratio save_first_step include_tokens_per_second"
        " fsdp_version fsdp_final_state_dict_type cut_cross_entropy bfloat16 float16 device_map max_memory"
        " experimental_skip_move_to_device qlora_sharded_model_loading tensor_parallel_size"
        " context_parallel_size sequence_parallel_degree remove_unused_columns",
        "align has no such switch",
    ),
}

DEFAULTS: dict[str, dict[str, Any]] = {
    "": {"lora.use_peft": False, "trainer.per_device_train_batch_size": 1},
}
"""axolotl's own defaults where they differ from ours."""
