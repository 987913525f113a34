"""Weights in pieces: what an accelerate config or a launcher asks for, and which stages can do it.

FSDP2 and ZeRO-3 leave each process with a share of every weight. The training stages bring them together where they
save and prove; whatever else needs a whole model says so here, before one is loaded.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from align.config.paths import Trouble
from align.config.sections import LaunchSection, StageConfig
from align.config.yaml import read
from align.errors import AlignError
from align.resources import accelerate_config, display

SHARDED_STAGES = ("sft", "reward", "dpo")

KEY = ("launch", "accelerate")

SWITCHES = {"FSDP": "ACCELERATE_USE_FSDP", "DEEPSPEED": "ACCELERATE_USE_DEEPSPEED"}
"""`distributed_type` of an accelerate config -> the variable that says it is in force."""

BITSANDBYTES = ("8bit", "paged", "bnb", "ademamix")
"""Parts of the names of its optimizers; `adamw_torch_8bit` is torchao's."""


class Sharding(NamedTuple):
    """How weights are taken apart."""

    way: str
    """`FSDP` or `ZeRO-3`."""
    wrong: str | None = None
    """What is the matter with its settings."""
    hint: str | None = None


def asked_sharding(launch: LaunchSection) -> Sharding | None:
    """What the accelerate config of a recipe asks for; None where weights stay whole, or no such file is here."""
    path = accelerate_config(launch.accelerate) if launch.accelerate else None
    if path is None:
        return None
    try:
        given = read(path, display(path)).data
    except AlignError:
        return None  # told where the file is read to be launched
    kind = given.get("distributed_type")
    if kind == "FSDP":
        found = given.get("fsdp_config") or {}
        return _fsdp(found.get("fsdp_version", 1), found.get("fsdp_state_dict_type"))
    if kind == "DEEPSPEED":
        found = given.get("deepspeed_config") or {}
        return _deepspeed(found.get("zero_stage"), found.get("deepspeed_config_file"))
    return None


def turned_on(kind: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher turned FSDP or DEEPSPEED on for this process."""
    return environment.get(SWITCHES[kind], "").lower() == "true"


def sharding_in_force(environment: Mapping[str, str] = os.environ) -> Sharding | None:
    """What a launcher turned on for this process."""
    if turned_on("FSDP", environment):
        version = environment.get("FSDP_VERSION", "1")
        return _fsdp(version, environment.get("FSDP_STATE_DICT_TYPE"))
    if turned_on("DEEPSPEED", environment):
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
        return _deepspeed(stage, environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"))
    return None


def _fsdp(version: Any, state: Any) -> Sharding:
    if str(version) != "2":
        wrong, hint = f"asks for FSDP {version}", "set `fsdp_version: 2` in it, or name `fsdp2`"
        return Sharding("FSDP", wrong, hint)
    if state is not None and "SHARDED" not in str(state):
        wrong = (
            f"asks for checkpoints of one piece (`{state}`), which are pickles of the whole model"
        )
        return Sharding("FSDP", wrong, "set `fsdp_state_dict_type: SHARDED_STATE_DICT` in it")
    return Sharding("FSDP")


def _deepspeed(stage: Any, file: str | None) -> Sharding | None:
    if file:
        try:
            given = read(Path(file), file).data  # JSON is YAML
        except (AlignError, OSError):
            return None  # DeepSpeed says what is wrong with it
        stage = (given.get("zero_optimization") or {}).get("stage")
    return Sharding("ZeRO-3") if str(stage) == "3" else None


def _of_bitsandbytes(optimizer: str) -> bool:
    return "torch" not in optimizer and any(part in optimizer for part in BITSANDBYTES)


def sharding_troubles(config: StageConfig, sharding: Sharding | None) -> Iterator[Trouble]:
    """What of a stage cannot be done with weights in pieces."""
    if sharding is None:
        return
    values = {name: getattr(config, name) for name in type(config).model_fields}
    way, stage = sharding.way, values["stage"]
    if stage not in SHARDED_STAGES:
        message = f"shards the weights ({way}), and `{stage}` needs them whole in every process"
        yield Trouble(KEY, message, "use `ddp` for this stage")
        return
    if sharding.wrong is not None:
        yield Trouble(KEY, sharding.wrong, sharding.hint)
    model, lora, trainer = values["model"], values["lora"], values["trainer"]
    whole = {
        ("model", "load_in_4bit"): model.load_in_4bit,
        ("model", "load_in_8bit"): model.load_in_8bit,
        ("lora", "trainable_token_indices"): lora.use_peft and lora.trainable_token_indices,
        ("lora", "lora_modules_to_save"): lora.use_peft and lora.lora_modules_to_save,
        ("lora", "use_dora"): way == "ZeRO-3" and lora.use_peft and lora.use_dora,
        # bitsandbytes' kernels read past the end of FSDP2's pieces (its issue 1633).
        ("trainer", "optim"): way == "FSDP" and _of_bitsandbytes(trainer.optim),
        ("trainer", "keep_checkpoints"): trainer.keep_checkpoints,
        ("precompute_ref_log_probs",): values.get("precompute_ref_log_probs"),
    }
    for key, on in whole.items():
        if on:
            message = f"needs whole weights in a process, and {way} takes them apart"
            yield Trouble(key, message, "leave it out, or use `ddp`", (".".join(KEY),))
