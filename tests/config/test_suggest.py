"""A mistyped key is answered with the key that was meant."""

import pytest

from align.config.draft import Draft
from align.config.fields import config_class, leaf_fields
from align.config.problems import Source
from align.config.suggest import OTHER_WORDS, advice, nearest, nearest_key
from align.stages import STAGES

TYPOS = [
    ("sft", "learnin_rate", "trainer.learning_rate"),
    ("sft", "leraning_rate", "trainer.learning_rate"),
    ("sft", "lerning-rate", "trainer.learning_rate"),
    ("sft", "learningrate", "trainer.learning_rate"),
    ("sft", "LEARNING_RATE", "trainer.learning_rate"),
    ("sft", "trainer.learing_rate", "trainer.learning_rate"),
    ("sft", "model.learning_rate", "trainer.learning_rate"),
    ("sft", "lr", "trainer.learning_rate"),
    ("sft", "num_epochs", "trainer.num_train_epochs"),
    ("sft", "num_training_epochs", "trainer.num_train_epochs"),
    ("sft", "epochs", "trainer.num_train_epochs"),
    ("sft", "batch_size", "trainer.per_device_train_batch_size"),
    ("sft", "per_device_batch_size", "trainer.per_device_train_batch_size"),
    ("sft", "per_device_train_batchsize", "trainer.per_device_train_batch_size"),
    ("sft", "per_gpu_train_batch_size", "trainer.per_device_train_batch_size"),
    ("sft", "gradient_acumulation_steps", "trainer.gradient_accumulation_steps"),
    ("sft", "grad_accum", "trainer.gradient_accumulation_steps"),
    ("sft", "gradient_checkpoint", "trainer.gradient_checkpointing"),
    ("sft", "warmup_ratio", "trainer.warmup_steps"),
    ("sft", "warmup_step", "trainer.warmup_steps"),
    ("sft", "lr_scheduler", "trainer.lr_scheduler_type"),
    ("sft", "lr_schedular_type", "trainer.lr_scheduler_type"),
    ("sft", "optimizer", "trainer.optim"),
    ("sft", "weight_deacy", "trainer.weight_decay"),
    ("sft", "max_grad_nrom", "trainer.max_grad_norm"),
    ("sft", "sead", "trainer.seed"),
    ("sft", "save_step", "trainer.save_steps"),
    ("sft", "logging_step", "trainer.logging_steps"),
    ("sft", "evaluation_strategy", "trainer.eval_strategy"),
    ("sft", "eval_startegy", "trainer.eval_strategy"),
    ("sft", "report", "trainer.report_to"),
    ("sft", "model_name", "model.model_name_or_path"),
    ("sft", "model_name_or_pth", "model.model_name_or_path"),
    ("sft", "modle_name_or_path", "model.model_name_or_path"),
    ("sft", "adapter_name", "model.adapter_name_or_path"),
    ("sft", "tokenizer_name", "model.tokenizer_name_or_path"),
    ("sft", "torch_dtype", "model.dtype"),
    ("sft", "dtpye", "model.dtype"),
    ("sft", "load_in_4bits", "model.load_in_4bit"),
    ("sft", "attn_implementaion", "model.attn_implementation"),
    ("sft", "lora_rank", "lora.lora_r"),
    ("sft", "lora.r", "lora.lora_r"),
    ("sft", "lora_aplha", "lora.lora_alpha"),
    ("sft", "lora_droput", "lora.lora_dropout"),
    ("sft", "target_modules", "lora.lora_target_modules"),
    ("sft", "lora_target_module", "lora.lora_target_modules"),
    ("sft", "use_lora", "lora.use_peft"),
    ("sft", "use_drora", "lora.use_dora"),
    ("sft", "dataset", "data.dataset_name"),
    ("sft", "data.name", "data.dataset_name"),
    ("sft", "dataset_nmae", "data.dataset_name"),
    ("sft", "max_seq_length", "data.max_length"),
    ("sft", "data.max_lenght", "data.max_length"),
    ("sft", "trainer.max_lenght", "data.max_length"),
    ("sft", "packng", "data.packing"),
    ("sft", "asistant_only_loss", "data.assistant_only_loss"),
    ("sft", "system_promt", "data.system_prompt"),
    ("sft", "output", "output_dir"),
    ("sft", "outptu_dir", "output_dir"),
    ("sft", "nproc", "launch.num_processes"),
    ("sft", "num_proceses", "launch.num_processes"),
    ("sft", "merge_adaptor", "merge_adapter"),
    ("dpo", "bata", "beta"),
    ("dpo", "loss", "loss_type"),
    ("dpo", "lable_smoothing", "label_smoothing"),
    ("dpo", "f_divergence", "f_divergence_type"),
    ("dpo", "precompute_ref_logprobs", "precompute_ref_log_probs"),
    ("reward", "center_reward_coefficient", "center_rewards_coefficient"),
    ("reward", "margin", "use_margin"),
    ("sample", "num_samples", "generation.num_generations"),
    ("sample", "generation.temprature", "generation.temperature"),
    ("sample", "max_tokens", "generation.max_new_tokens"),
    ("sample", "topp", "generation.top_p"),
    ("sample", "reward_model_path", "scorer.reward_model"),
    ("sample", "scorer.juge", "scorer.judge"),
    ("sample", "pair_rules", "pairs.pair_rule"),
    ("eval", "model", "models"),
    ("eval", "bestof", "best_of"),
    ("eval", "confidance", "confidence"),
    ("eval", "temperature", "generation.temperatures"),
]


def test_at_least_95_of_100_typos_lead_to_the_right_key():
    assert len(TYPOS) >= 50
    wrong = []
    for kind, typo, meant in TYPOS:
        draft = Draft(config_class(kind), Source("r.yaml"))
        assert draft.find(typo)[0] is None, typo
        hint = advice(typo, draft.leaves)
        if hint != f"did you mean `{meant}`?":
            wrong.append((typo, meant, hint))
    assert len(wrong) <= 0.05 * len(TYPOS), wrong


@pytest.mark.parametrize("word", ["zzz", "qwertyuiop", "flux_capacitor"])
def test_words_that_are_like_nothing_get_no_suggestion(word):
    known = [leaf.name for leaf in leaf_fields(config_class("sft"))]
    assert nearest_key(word, known) is None


def test_keys_that_are_gone_say_what_to_do_instead():
    known = [leaf.name for leaf in leaf_fields(config_class("sft"))]
    assert "data.max_length" in str(advice("max_prompt_length", known))
    assert "never overwritten" in str(advice("trainer.overwrite_output_dir", known))


def test_other_tools_words_lead_to_keys_that_exist():
    leaves = {leaf.leaf for kind in STAGES for leaf in leaf_fields(config_class(kind))}
    assert set(OTHER_WORDS) <= leaves
    words = [word for words in OTHER_WORDS.values() for word in words.split()]
    assert len(words) == len(set(words)), "a word leads to two keys"


def test_nearest_ignores_case_and_hyphens_but_not_sense():
    assert nearest("BF16", ["auto", "bfloat16"], 0.5) == "bfloat16"
    assert nearest("Adamw-Torch", ["sgd", "adamw_torch"]) == "adamw_torch"
    assert nearest("x", ["abc"]) is None
    assert nearest("x", []) is None
