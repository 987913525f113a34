"""Which tool a recipe was written for, and which method it trains, told from its keys."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from align.errors import fail
from align.stages import STAGES

Tool = Literal["handbook", "trl", "llamafactory", "axolotl"]


def _words_of(text: str) -> frozenset[str]:
    return frozenset(text.split())


TITLES: dict[Tool, str] = {
    "handbook": "alignment-handbook",
    "trl": "TRL",
    "llamafactory": "LLaMA-Factory",
    "axolotl": "axolotl",
}

TELLING: dict[Tool, frozenset[str]] = {
    "axolotl": _words_of(
        "base_model micro_batch_size num_epochs sequence_len adapter sample_packing rl val_set_size"
        " lora_target_linear dataset_prepared_path pad_to_sequence_len tokenizer_type model_type"
        " train_on_inputs optimizer lr_scheduler evals_per_epoch saves_per_epoch"
    ),
    "llamafactory": _words_of(
        "finetuning_type cutoff_len dataset dataset_dir template lora_target lora_rank pref_beta"
        " pref_loss pref_ftx val_size overwrite_cache plot_loss flash_attn quantization_bit"
    ),
    "handbook": _words_of(
        "dataset_mixer dataset_mixture dataset_splits dataset_configs preprocessing_num_workers"
        " use_flash_attention_2 hub_model_revision push_to_hub_revision auto_insert_empty_system_msg"
        " chat_template"
    ),
}
"""Keys that only one tool has; TRL is what is left."""

FLAT = _words_of(
    "model_name_or_path dataset_name datasets dataset_mixer dataset_mixture learning_rate output_dir"
    " per_device_train_batch_size"
)
"""Names that TRL and the handbook have at the top of a file."""

SECTIONS = ("model", "data", "trainer", "lora", "launch", "generation", "scorer")

METHODS = {
    "sft": "sft",
    "pt": "sft",
    "cpt": "sft",
    "rm": "reward",
    "reward": "reward",
    "dpo": "dpo",
    "ipo": "dpo",
    "apo": "dpo",
    "ppo": "ppo",
    "orpo": "orpo",
    "kto": "kto",
    "cpo": "cpo",
    "simpo": "simpo",
    "grpo": "grpo",
    "rloo": "rloo",
    "gkd": "gkd",
    "prm": "prm",
    "xpo": "xpo",
}
"""Word -> our stage, or a method's own name where there is no stage for it."""

EVIDENCE: tuple[tuple[str, frozenset[str]], ...] = (
    ("kto", frozenset({"desirable_weight", "undesirable_weight"})),
    ("grpo", frozenset({"reward_funcs", "reward_weights", "scale_rewards"})),
    ("cpo", frozenset({"cpo_alpha", "simpo_gamma"})),
    (
        "ppo",
        _words_of(
            "num_ppo_epochs cliprange cliprange_value total_episodes reward_model_path sft_model_path"
            " init_kl_coef adap_kl_ctrl ppo_epochs vf_coef missing_eos_penalty response_length"
            " local_rollout_forward_batch_size num_mini_batches"
        ),
    ),
    (
        "dpo",
        _words_of(
            "precompute_ref_log_probs f_divergence_type discopop_tau rpo_alpha pref_ftx"
            " nll_loss_coef sft_loss_weight beta loss_type label_smoothing ld_alpha"
        ),
    ),
    ("reward", frozenset({"center_rewards_coefficient"})),
    (
        "sft",
        _words_of(
            "max_seq_length packing assistant_only_loss completion_only_loss dataset_text_field"
            " eos_token packing_strategy neftune_noise_alpha"
        ),
    ),
)
"""Method -> keys of which one is enough, the rarest first."""


def tool_of(data: Mapping[str, Any]) -> Tool | None:
    """The tool whose keys a recipe has; None where it is one of ours, or of none of them."""
    if "stages" in data or any(isinstance(data.get(name), Mapping) for name in SECTIONS):
        return None
    scores = {tool: len(keys & set(data)) for tool, keys in TELLING.items()}
    if _typed_datasets(data):
        scores["axolotl"] += 2
    if data.get("stage") in ("rm", "pt", "kto") or ("stage" in data and "dataset" in data):
        scores["llamafactory"] += 2
    best = max(scores, key=lambda tool: scores[tool])
    if best in ("axolotl", "llamafactory") and scores[best] >= 2:
        return best
    if "stage" in data:
        return None
    if scores["handbook"]:
        return "handbook"
    return "trl" if len(FLAT & set(data)) >= 2 else None


def _typed_datasets(data: Mapping[str, Any]) -> bool:
    entries = data.get("datasets")
    return isinstance(entries, list) and any(
        isinstance(entry, Mapping) and "type" in entry for entry in entries
    )


def method_of(tool: Tool, data: Mapping[str, Any], file: Path) -> str | None:
    """The stage a recipe is for, or the name of a method that has none; None where nothing says."""
    if tool == "llamafactory":
        return _llamafactory(data)
    if tool == "axolotl":
        return _axolotl(data)
    words = list(_words(data, file))
    named = next((METHODS[word] for word in words if word in METHODS), None)
    keys = set(data) - ({"loss_type"} if data.get("loss_type") in ("nll", "dft") else set())
    strong = next((method for method, telling in EVIDENCE if telling & keys), None)
    if named is not None and named not in STAGES:
        # An ORPO recipe has the keys of a DPO recipe; only its names tell.
        return named
    return strong or _from_rows(data) or named


def _llamafactory(data: Mapping[str, Any]) -> str | None:
    stage = str(data.get("stage", "sft"))
    loss = str(data.get("pref_loss", ""))
    if stage == "dpo" and loss in ("orpo", "simpo"):
        return loss
    return METHODS.get(stage, stage)


def _axolotl(data: Mapping[str, Any]) -> str | None:
    if data.get("rl"):
        return METHODS.get(str(data["rl"]), str(data["rl"]))
    return "reward" if data.get("reward_model") is True else "sft"


def _from_rows(data: Mapping[str, Any]) -> str | None:
    """The method that the names of splits and columns speak of."""
    texts = str(
        [data.get(key) for key in ("dataset_splits", "dataset_mixture", "dataset_train_split")]
    )
    if re.search(r"prefs|chosen|rejected", texts):
        return "dpo"
    return "sft" if re.search(r"_sft|messages|_gen\b", texts) else None


def _words(data: Mapping[str, Any], file: Path) -> Iterable[str]:
    """Words that may name a method: the file's folders, its name, what the run is called."""
    yield from reversed([part.lower() for part in file.parts[-3:-1]])
    yield from re.split(r"[^a-z]+", file.stem.lower())
    for key in ("output_dir", "hub_model_id", "run_name"):
        yield from reversed(re.split(r"[^a-z]+", str(data.get(key, "")).lower()))


def stage_of(tool: Tool, data: Mapping[str, Any], file: Path, name: str, given: str | None) -> str:
    """The stage of a recipe: as it was given, or as its keys and names tell.

    Raises:
        AlignError: nothing tells it, or it is a method that align does not offer.
    """
    method = method_of(tool, data, file)
    if given is not None:
        return given
    if method is None:
        hint = f"name it: --stage with one of {', '.join(kind for kind in STAGES)}"
        fail("no key says what this recipe trains", where=name, hint=hint)
    if method not in STAGES:
        hint = f"--stage says what to train instead: {', '.join(STAGES)} (pairs go to `dpo`)"
        fail(f"is a recipe for {method.upper()}, which align does not offer", where=name, hint=hint)
    return method
