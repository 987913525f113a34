"""A stage's everyday flags and the list of all its keys, both read from the config fields."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from align.config.outline import Knob, outline

if TYPE_CHECKING:
    from align.config.draft import Override

MODEL = ("model.model_name_or_path", "model.adapter_name_or_path")
TRAINING = (
    "trainer.learning_rate",
    "trainer.num_train_epochs",
    "trainer.max_steps",
    "trainer.per_device_train_batch_size",
    "trainer.gradient_accumulation_steps",
    "trainer.seed",
)
LAUNCH = ("launch.num_processes", "launch.accelerate")
DATA = ("data.dataset_name", "data.max_length")

EVERYDAY: Mapping[str, tuple[str, ...]] = {
    "sft": ("output_dir", *MODEL, "lora.lora_r", *DATA, "data.packing", *TRAINING, *LAUNCH),
    "reward": ("output_dir", *MODEL, "lora.lora_r", *DATA, *TRAINING, *LAUNCH),
    "dpo": (
        *("output_dir", *MODEL, "lora.lora_r", *DATA),
        *(*TRAINING, "beta", "loss_type", *LAUNCH),
    ),
    "ppo": (
        *("output_dir", *MODEL, "lora.lora_r", "data.dataset_name", "data.dataset_train_split"),
        *("scorer.reward_model", *TRAINING, "total_episodes", "num_ppo_epochs"),
        *("num_mini_batches", "kl_coef", "generation.max_new_tokens", "generation.temperature"),
        *LAUNCH,
    ),
    "sample": (
        *("output_dir", *MODEL, "data.dataset_name", "data.dataset_train_split"),
        *("data.max_samples", "generation.num_generations", "generation.temperature"),
        *("generation.max_new_tokens", "generation.generation_batch_size"),
        *("scorer.reward_model", "scorer.judge", "pairs.pair_rule", "seed", *LAUNCH),
    ),
    "average": ("output_dir", "method", "svd_rank", "checkpoints", "dtype"),
    "eval": (
        *("output_dir", "data.dataset_name", "data.dataset_train_split", "data.max_samples"),
        *("generation.max_new_tokens", "generation.generation_batch_size"),
        *("judge", "reward_model", "reference", "baseline", "seed", *LAUNCH),
    ),
    "push": (
        *("output_dir", "hub.repo_id", "hub.merged", "hub.merged_dtype", "hub.public"),
        *("hub.revision", "hub.pr", "hub.collection", "hub.base_model_id", "hub.samples"),
    ),
}
"""Keys of each stage that are flags of their own; every other key goes through `--set`."""

PANELS = {
    "": "Stage",
    "model": "Model",
    "lora": "Model",
    "data": "Data",
    "trainer": "Training",
    "generation": "Generation",
    "scorer": "Scoring",
    "pairs": "Scoring",
    "alarms": "Alarms",
    "hub": "Hub",
    "launch": "Launch",
}
"""Section -> heading of its flags in the help."""


def everyday(kind: str) -> list[Knob]:
    """The fields behind a stage's flags, in the order of the help."""
    knobs = outline(kind)
    return [knobs[name] for name in EVERYDAY[kind]]


def flag(name: str) -> str:
    """`trainer.learning_rate` is `--learning-rate` on the command line."""
    return f"--{name.rpartition('.')[2].replace('_', '-')}"


def brief(knob: Knob) -> str:
    """A field's sentence up to its first pause, and its default."""
    words = knob.doc
    for pause in (" (", "; ", ": ", ", and"):
        words = words.partition(pause)[0]
    words = words.rstrip(".")
    return words if knob.default is None else f"{words} (default {as_text(knob.default)})"


def as_text(value: Any) -> str:
    """A value as the command line and the tables show it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def ordered(
    argv: Sequence[str], sets: Sequence[str], given: Mapping[str, Any]
) -> "list[str | Override]":
    """`--set` and flags as overrides in the order in which they were typed; the last one wins.

    Args:
        argv: the command line, with hyphens for underscores in the names of flags.
        sets: the values of `--set`, in order.
        given: dotted key -> value for the flags that were given.
    """
    from align.config.draft import Override

    found: list[str | Override] = []
    rest = iter(sets)
    names = {flag(key): Override(key, value, flag(key)) for key, value in given.items()}
    for word in argv:
        name = word.partition("=")[0]
        name = f"--{name[5:]}" if name.startswith("--no-") and name not in names else name
        if name == "--set":
            found += [text for text in [next(rest, None)] if text is not None]
        elif name in names:
            found.append(names[name])
    return found


def listing(kind: str, pattern: str) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Section by section: the (key, type and default, sentence) of every key that has `pattern`."""
    from align.config.fields import config_class, leaf_fields, short_type

    groups: dict[str, list[tuple[str, str, str]]] = {}
    for leaf in leaf_fields(config_class(kind)):
        searched = f"{leaf.name} {leaf.doc}".lower()
        if pattern.lower() in searched:
            default = "required" if leaf.required else f"default {as_text(leaf.default)}"
            facts = f"{short_type(leaf.annotation)} ({default})"
            groups.setdefault(leaf.section, []).append((leaf.name, facts, leaf.doc))
    yield from groups.items()
