"""LLaMA-Factory: flat YAML with `stage`, `finetuning_type` and registered data sets."""

from typing import Any

from align.translation import rules, trl_rules
from align.translation.rules import Changed, Joint, Lost, Rules, To

REGISTERED = "a name of LLaMA-Factory's dataset_info.json; give a Hub id, a file or a shipped data card instead"


def bits(value: Any) -> Any:
    """`quantization_bit` is read together with its method."""
    if value in (None, 0):
        raise Lost("off")
    return value


def attention(value: Any) -> Any:
    """LLaMA-Factory's words for the attention."""
    known = {
        "fa2": "flash_attention_2",
        "sdpa": "sdpa",
        "disabled": "eager",
        "fa3": "flash_attention_3",
    }
    if value in ("auto", None):
        raise Lost("transformers' own choice is the default")
    if value not in known:
        raise Lost(f"`{value}` is no attention here")
    return known[value]


def preference_loss(value: Any) -> Any:
    """`pref_loss`; ORPO and SimPO never come here."""
    if value == "kto_pair":
        raise Lost("TRL has no `kto_pair` any more; `sigmoid` is used")
    return value


def packed(value: Any) -> Any:
    """Ours always separates the rows it packs."""
    if value:
        return Changed(True, "rows are packed without attention between them")
    raise Lost("off")


RULES: Rules = {
    **trl_rules.RULES,
    "stage": Joint(),
    "finetuning_type": Joint(),
    "dataset": Joint(),
    "eval_dataset": Joint(),
    "dataset_dir": Joint(),
    "template": Joint(),
    "quantization_bit": Joint(),
    "lora_rank": To("lora.lora_r"),
    "lora_target": To("lora.lora_target_modules", rules.names),
    "additional_target": To("lora.lora_modules_to_save", rules.names),
    "quantization_type": To("model.bnb_4bit_quant_type"),
    "double_quantization": To("model.use_bnb_nested_quant"),
    "cutoff_len": To("data.max_length"),
    "val_size": To("data.test_split_size", rules.not_zero),
    "flash_attn": To("model.attn_implementation", attention),
    "pref_beta": To("beta"),
    "pref_loss": To("loss_type", preference_loss),
    "dpo_label_smoothing": To("label_smoothing"),
    "default_system": To("data.system_prompt"),
    "train_on_prompt": To("data.assistant_only_loss", lambda on: not on),
    "neat_packing": To("data.packing", packed),
    "enable_liger_kernel": Joint(),
    **rules.drops(
        "reward_model reward_model_adapters reward_model_type ppo_epochs ppo_buffer_size"
        " ppo_target ppo_score_norm ppo_whiten_rewards",
        "only PPO has it",
    ),
    **rules.drops(
        "overwrite_cache tokenized_path cache_dir buffer_size data_shared_file_system",
        "align keeps no cache of prepared rows",
    ),
    **rules.drops("plot_loss", "metrics.jsonl holds the losses"),
    **rules.drops(
        "quantization_method quantization_device_map upcast_layernorm upcast_lmhead_output pure_bf16"
        " use_unsloth use_unsloth_gc use_kv_cache infer_dtype infer_backend low_cpu_mem_usage"
        " disable_gradient_checkpointing use_reentrant_gc print_param_status rope_scaling shift_attn"
        " resize_vocab split_special_tokens use_fast_tokenizer mixture_of_depths moe_aux_loss_coef"
        " create_new_adapter pissa_init loraplus_lr_ratio use_galore use_badam use_apollo use_adam_mini"
        " use_muon freeze_trainable_layers",
        "align has no such switch",
    ),
    **rules.drops("mix_strategy interleave_probs", "`data.datasets` takes entries with weights"),
    **rules.drops(
        "mask_history",
        "every assistant turn is in the loss, but for those with `weight: 0` in the rows",
    ),
    **rules.drops("enable_thinking", "the chat template decides"),
    **rules.drops(
        "ref_model_adapters ref_model_quantization_bit", "the reference is the start itself"
    ),
    **rules.drops("predict_with_generate do_sample", "`align sample` and `align eval` generate"),
    **rules.drops("ray_run_name ray_num_workers resources_per_worker", "no Ray is used"),
}

DEFAULTS: dict[str, dict[str, Any]] = {
    "": {
        "trainer.num_train_epochs": 3,
        "trainer.learning_rate": 5e-5,
        "trainer.lr_scheduler_type": "linear",
        "trainer.warmup_steps": 0,
        "data.max_length": 2048,
    },
}
ADAPTER_DEFAULTS = {"lora.lora_r": 8}
"""Alpha is twice the rank there; see `fill` in the tool's own function."""
