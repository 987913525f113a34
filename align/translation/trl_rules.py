"""alignment-handbook and TRL: one table, as the handbook's recipes are TRL's flat YAML of their time."""

from typing import Any

from align.config.names import ALIASES
from align.config.suggest import GONE
from align.translation import rules
from align.translation.rules import Drop, Extra, Joint, Rules, To

HUB = "a complete run is pushed once (`hub.repo_id`), with the token of `hf auth login` or HF_TOKEN"
LENGTHS = "rows are rendered to token ids by align itself"

PUSH = (
    *("push_to_hub", "hub_model_id", "push_to_hub_model_id", "push_to_hub_organization"),
    *("hub_private_repo", "hub_revision", "hub_model_revision", "push_to_hub_revision"),
)
"""Keys that together say whether, where and how the model is pushed."""

RULES: Rules = {
    # what TRL and transformers have renamed
    "torch_dtype": To("model.dtype", rules.dtype),
    "dtype": To("model.dtype", rules.dtype),
    "use_flash_attention_2": To("model.attn_implementation", rules.flash),
    "max_seq_length": To("data.max_length"),
    "evaluation_strategy": To("trainer.eval_strategy", rules.strategy),
    "eval_strategy": To("trainer.eval_strategy", rules.strategy),
    "warmup_ratio": To("trainer.warmup_steps", rules.ratio),
    "preprocessing_num_workers": To("data.dataset_num_proc"),
    "dataset_config_name": To("data.dataset_config"),
    "subset": To("data.dataset_config"),
    "chat_template": Joint(),
    "chat_template_path": Joint(),
    "group_by_length": To(
        "trainer.train_sampling_strategy", lambda on: "group_by_length" if on else "random"
    ),
    "accelerate_config": To("launch.accelerate"),
    "lora_rank": To("lora.lora_r"),
    "target_modules": To("lora.lora_target_modules", rules.names),
    "loss_type": Joint(),
    "label_smoothing_factor": Extra(),
    **{
        name: To("rpo_alpha", rules.not_zero)
        for name, ours in ALIASES.items()
        if ours == "rpo_alpha"
    },
    "rpo_alpha": To("rpo_alpha", rules.not_zero),
    # the same name with another range of values
    "lora_target_modules": To("lora.lora_target_modules", rules.names),
    "optim": To("trainer.optim", rules.optimizer),
    "report_to": To("trainer.report_to", rules.trackers),
    "truncation_mode": To("data.truncation_mode", rules.truncation),
    "save_steps": To("trainer.save_steps", rules.whole_steps),
    "eval_steps": To("trainer.eval_steps", rules.whole_steps),
    "logging_steps": To("trainer.logging_steps", rules.whole_steps),
    "fp16": To("trainer.bf16", rules.no_half),
    "gradient_checkpointing_kwargs": Joint(),
    # rows
    "dataset_name": Joint(),
    "dataset_mixer": Joint(),
    "dataset_mixture": Joint(),
    "dataset_splits": Joint(),
    "dataset_configs": Joint(),
    "datasets": Joint(),
    "dataset_seed": Drop("a mixture is drawn with align's own fixed seed"),
    "auto_insert_empty_system_msg": Drop("the chat template decides; see `data.system_prompt`"),
    "dataset_text_field": Joint(),
    "text_column": Joint(),
    **rules.drops("dataset_kwargs eval_packing dataset_batch_size", LENGTHS),
    **rules.drops(
        "eos_token pad_token", "the tokenizer and its chat template say what ends a turn"
    ),
    **rules.drops("truncation_side", "rows are cut at the end"),
    **rules.drops("completion_only_loss", "always so for prompts with completions"),
    **rules.drops(
        "shuffle_dataset", "`trainer.train_sampling_strategy` says the order of the rows"
    ),
    **rules.drops("dataset_streaming streaming data_dir", "rows are read whole"),
    **rules.drops("max_target_length max_completion_length", GONE["max_prompt_length"]),
    # arguments without a key of their own
    **rules.extras(
        "activation_offloading average_tokens_across_devices data_seed dataloader_drop_last"
        " dataloader_persistent_workers dataloader_prefetch_factor ddp_backend ddp_bucket_cap_mb"
        " ddp_find_unused_parameters ddp_timeout eval_accumulation_steps eval_delay eval_on_start"
        " full_determinism load_best_model_at_end metric_for_best_model greater_is_better"
        " neftune_noise_alpha optim_args optim_target_modules pad_to_multiple_of run_name tf32"
        " torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps"
        " use_liger_kernel bf16_full_eval"
    ),
    **rules.extras("packing_strategy", "sft"),
    **rules.extras("padding_free router_aux_loss_coef", "sft", "dpo"),
    **rules.extras("disable_dropout", "reward", "dpo"),
    **rules.extras(
        "discopop_tau f_alpha_divergence_coef ld_alpha precompute_ref_batch_size sync_ref_model"
        " ref_model_mixup_alpha ref_model_sync_steps use_weighting",
        "dpo",
    ),
    # what has no counterpart
    **{key: Drop(reason) for key, reason in GONE.items() if key not in ("fp16", *PUSH)},
    "do_eval": Drop("`trainer.eval_strategy` decides"),
    **dict.fromkeys(PUSH, Joint()),
    **rules.drops("hub_strategy hub_token hub_always_push hub_dataset_id push_to_hub_token", HUB),
    **rules.drops(
        "logging_dir log_level log_level_replica log_on_each_node logging_first_step"
        " logging_nan_inf_filter disable_tqdm verbose generate_during_eval log_completions",
        "metrics.jsonl and the terminal's lines are align's own",
    ),
    **rules.drops(
        "wandb_entity wandb_project wandb_run_group wandb_log_unique_prompts project"
        " trackio_space_id trackio_bucket_id trackio_static_space_id",
        "trackers read their own environment variables (WANDB_PROJECT, ...)",
    ),
    **rules.drops(
        "fsdp fsdp_config deepspeed parallelism_config accelerator_config local_rank"
        " fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap ddp_broadcast_buffers ddp_static_graph",
        "`launch.accelerate` names an accelerate config",
    ),
    **rules.drops(
        "env concatenate_output machine_rank num_machines main_process_port main_process_ip",
        "environment and machines are set where the command is started",
    ),
    **rules.drops(
        "remove_unused_columns label_names length_column_name include_for_metrics"
        " include_num_input_tokens_seen include_tokens_per_second prediction_loss_only"
        " batch_eval_metrics eval_do_concat_batches eval_use_gather_object label_pad_token_id"
        " padding_value is_encoder_decoder use_cpu no_cuda skip_memory_metrics debug use_cache"
        " do_predict dataloader_pin_memory dataloader_in_order dataloader_multiprocessing_context"
        " auto_find_batch_size ignore_bias_buffers reference_free use_num_logits_to_keep"
        " half_precision_backend fp16_full_eval model_code_revision lora_task_type"
        " base_model_attribute_name use_logits_to_keep activation_checkpointing"
        " activation_checkpointing_kwargs liger_kernel_config lora_target_parameters",
        "decided by align",
    ),
    **rules.drops(
        "save_on_each_node save_only_model save_safetensors enable_jit_checkpoint ignore_data_skip"
        " restore_callback_states_from_checkpoint load_adapter_in_float32",
        "checkpoints are complete, in safetensors, and always resumed",
    ),
    **rules.drops("bnb_4bit_quant_storage", "the storage type is bitsandbytes' own"),
    **rules.drops("bnb_4bit_compute_dtype", "computed in `model.dtype`"),
    **rules.drops(
        "ref_model model_init_kwargs ref_model_init_kwargs model_adapter_name ref_adapter_name"
        " force_use_ref_model ref_model_revision",
        "the reference is the model that the stage starts from",
    ),
    **rules.drops(
        "callbacks benchmarks eval_steps_per_epoch", "`align eval` is a stage of its own"
    ),
}

DEFAULTS: dict[str, dict[str, Any]] = {
    "": {
        "lora.use_peft": False,
        "trainer.num_train_epochs": 3,
        "trainer.lr_scheduler_type": "linear",
        "trainer.warmup_steps": 0,
    },
    "sft": {"trainer.learning_rate": 2e-5, "data.assistant_only_loss": False},
    "dpo": {"trainer.learning_rate": 1e-6},
}
"""TRL's own defaults where they differ from ours: for all stages, and by stage."""

ADAPTER_DEFAULTS = {"lora.lora_dropout": 0.05}
QUANTIZED_DEFAULTS = {"model.use_bnb_nested_quant": False}
