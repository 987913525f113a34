"""`$name` in a pipeline: the artifact of an earlier stage, checked by kind before anything runs."""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, NamedTuple

from align.config.paths import DATA_KEYS, MODEL_KEYS, Trouble, path_values, put
from align.config.problems import KeyPath
from align.config.sections import StageConfig
from align.config.suggest import nearest
from align.resources import exists

FORM = re.compile(r"\$([A-Za-z_][\w-]*(?:@\d+)?)(?:/(.+))?")
"""`$name`, `$name/file`; `$name@2` is a stage of the second round."""

Produces = Literal[
    "policy", "adapter", "reward model", "reward adapter", "samples", "results", "record"
]

SAMPLE_FILES = ("sft.jsonl", "pairs.jsonl", "samples.parquet")
"""What `align sample` leaves in its artifact."""


class Reference(NamedTuple):
    """A value of a stage that names an earlier stage."""

    path: KeyPath
    pattern: str
    """The path key it stands at: `models.*`."""
    text: str
    stage: str
    file: str | None


def is_reference(text: str) -> bool:
    """Whether a value has the form `$name` or `$name/file`."""
    return FORM.fullmatch(text) is not None


def references(config: StageConfig) -> list[Reference]:
    """Every reference of a stage's config."""
    found = []
    for pattern, path, text in path_values(config.model_dump()):
        match = FORM.fullmatch(text)
        if match:
            found.append(Reference(path, pattern, text, match[1], match[2]))
    return found


def substitute(config: StageConfig, artifacts: Mapping[str, Path]) -> StageConfig:
    """The config with each `$name` replaced by that stage's artifact folder (or a file in it)."""
    nested = config.model_dump(exclude_unset=True)
    for reference in references(config):
        artifact = artifacts[reference.stage]
        put(nested, reference.path, str(artifact / (reference.file or "")))
    return type(config).model_validate(nested)


MERGED: dict[str, Produces] = {"adapter": "policy", "reward adapter": "reward model"}


def produces(config: StageConfig, stages: Mapping[str, StageConfig] | None = None) -> Produces:
    """What kind of artifact a stage leaves; an average leaves what its first model is, a stage of `stages` mostly."""
    kind = config.model_dump(include={"stage"})["stage"]
    if kind == "average":
        found = _averaged(config, stages or {})
        merge = config.model_dump(include={"method"})["method"] == "merge"
        return MERGED.get(found, found) if merge else found
    if kind == "sample":
        return "samples"
    if kind == "eval":
        return "results"
    if kind == "push":
        return "record"
    use_peft = config.model_dump(include={"lora"})["lora"]["use_peft"]
    if kind == "reward":
        return "reward adapter" if use_peft else "reward model"
    merged = config.model_dump(include={"merge_adapter"}).get("merge_adapter", False)
    return "adapter" if use_peft and not merged else "policy"


def _first(config: StageConfig) -> str:
    """The first model of an average."""
    return str(next(iter(config.model_dump(include={"models"})["models"].values()), ""))


def _averaged(config: StageConfig, stages: Mapping[str, StageConfig]) -> Produces:
    """What the first model of an average is."""
    return _member(config, _first(config), stages)


def _above(name: str, stages: Mapping[str, StageConfig]) -> dict[str, StageConfig]:
    """The stages above one, which are all that it can be made of: averages cannot go in circles."""
    return dict(takewhile(lambda item: item[0] != name, stages.items()))


def _member(config: StageConfig, text: str, stages: Mapping[str, StageConfig]) -> Produces:
    """What one model of an average is: an earlier stage's artifact, its checkpoints, or a folder."""
    match = FORM.fullmatch(text)
    if match and match[1] in stages:
        target = stages[match[1]]
        kept = config.model_dump(include={"checkpoints"})["checkpoints"] is not None
        if kept and "merge_adapter" in type(target).model_fields:
            # What a run keeps of its checkpoints are the adapters, whatever becomes of the last one.
            target = target.model_copy(update={"merge_adapter": False})
        return produces(target, _above(match[1], stages))
    facts = _adapter_facts(text)
    if facts is None:
        return "policy"
    return "reward adapter" if facts.get("task_type") == "SEQ_CLS" else "adapter"


def _adapter_facts(folder: str) -> Mapping[str, Any] | None:
    """adapter_config.json of a folder; empty where it cannot be read, None where there is none."""
    file = Path(folder).expanduser() / "adapter_config.json"
    if not exists(file):
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, Mapping) else {}


def base_of(config: StageConfig, stages: Mapping[str, StageConfig]) -> str | None:
    """The full model that a stage starts from; an average's is that of its first model.

    None for stages that start from none, and for a member of which nothing is known.
    """
    if config.model_dump(include={"stage"})["stage"] != "average":
        return getattr(getattr(config, "model", None), "model_name_or_path", None)
    first = _first(config)
    match = FORM.fullmatch(first)
    if match is None:
        facts = _adapter_facts(first)
        return first if facts is None else facts.get("base_model_name_or_path")
    return base_of(stages[match[1]], _above(match[1], stages)) if match[1] in stages else None


def _model_trouble(
    reference: Reference, config: StageConfig, stages: Mapping[str, StageConfig]
) -> tuple[str, str] | None:
    """Message and hint where an artifact does not fit a key that names a model."""
    target, text = stages[reference.stage], reference.text
    name, kind = reference.stage, produces(target, stages)
    if kind in ("samples", "results", "record"):
        held = "the record of a push" if kind == "record" else kind
        return f"needs a model, and `{text}` holds {held}", "name a stage that trains a model"
    if reference.file:
        return f"needs a model folder, and `{text}` is a file in it", f"write `${name}`"
    if reference.pattern == "run":
        return None
    if config.model_dump(include={"stage"})["stage"] == "average":
        first, own = _averaged(config, stages), _member(config, text, stages)
        if own != first:
            message = f"is of the kind {own}, and the first model of the kind {first}"
            return message, "average models of one kind: set `merge_adapter` alike in their stages"
        return None
    wants_reward = reference.pattern.endswith("reward_model")
    is_reward = kind in ("reward model", "reward adapter")
    if reference.pattern == "model.tokenizer_name_or_path":
        return None
    if wants_reward and not is_reward:
        return (
            f"needs a reward model, and the stage `{name}` leaves a policy",
            "name a stage of kind `reward`",
        )
    if is_reward and not wants_reward:
        return (
            f"needs a policy, and the stage `{name}` leaves a reward model",
            "name a stage of kind `sft` or `dpo`; a reward model belongs under `reward_model`",
        )
    if reference.pattern == "model.model_name_or_path" and kind == "adapter":
        return (
            f"needs a full model, and the stage `{name}` leaves an adapter",
            f"set `adapter_name_or_path: {text}` and `model_name_or_path: {base_of(target, stages) or '<its base>'}`, "
            f"or `merge_adapter: true` in `{name}`",
        )
    if reference.pattern == "model.adapter_name_or_path" and kind == "policy":
        return (
            f"needs an adapter, and the stage `{name}` leaves a full model",
            f"set `model_name_or_path: {text}` and leave `adapter_name_or_path` out",
        )
    return None


def _data_trouble(
    reference: Reference, config: StageConfig, stages: Mapping[str, StageConfig]
) -> tuple[str, str] | None:
    """Message and hint where an artifact does not fit a key that names rows."""
    name, kind = reference.stage, produces(stages[reference.stage], stages)
    reader = config.model_dump(include={"stage"})["stage"]
    if kind != "samples":
        return (
            f"needs rows, and the stage `{name}` leaves a {kind}",
            "name a stage of kind `sample`",
        )
    wanted = {"sft": "sft.jsonl", "reward": "pairs.jsonl", "dpo": "pairs.jsonl"}.get(reader)
    files = [f"`${name}/{file}`" for file in SAMPLE_FILES]
    if reference.file not in SAMPLE_FILES:
        choice = f"write `${name}/{wanted}`" if wanted else f"one of {', '.join(files)}"
        return f"needs a file of the stage `{name}`, got `{reference.text}`", choice
    mapped = config.model_dump(include={"data"})["data"]["columns"]
    if reader in ("reward", "dpo") and reference.file == "sft.jsonl":
        return "needs pairs, and `sft.jsonl` holds single answers", f"write `${name}/pairs.jsonl`"
    if reader == "sft" and reference.file == "pairs.jsonl" and not mapped:
        return "needs answers, and `pairs.jsonl` holds pairs", f"write `${name}/sft.jsonl`"
    return None


def check(
    name: str,
    stages: Mapping[str, StageConfig],
    optional: Sequence[str],
    chosen: Sequence[str],
) -> list[Trouble]:
    """What is wrong with the references of one stage.

    Args:
        name: the stage.
        stages: every stage of the pipeline in order.
        optional: names of the stages that run only when asked for.
        chosen: the optional stages that are asked for.
    """
    order = list(stages)
    found = []
    for reference in references(stages[name]):
        if reference.stage not in stages:
            close = nearest(reference.stage, order)
            hint = f"did you mean `${close}`?" if close else f"stages: {', '.join(order)}"
            found.append(Trouble(reference.path, f"names no stage: `{reference.text}`", hint))
            continue
        if order.index(reference.stage) >= order.index(name):
            what = "itself" if reference.stage == name else f"the later stage `{reference.stage}`"
            hint = "a stage can only use what stages above it leave"
            found.append(Trouble(reference.path, f"refers to {what}", hint))
            continue
        if reference.stage in optional and reference.stage not in chosen:
            message = f"needs the optional stage `{reference.stage}`, which does not run"
            hint = f"add `--with {reference.stage}`"
            found.append(Trouble(reference.path, message, hint))
            continue
        wrong = None
        if reference.pattern in MODEL_KEYS:
            wrong = _model_trouble(reference, stages[name], stages)
        elif reference.pattern in DATA_KEYS:
            wrong = _data_trouble(reference, stages[name], stages)
        if wrong:
            found.append(Trouble(reference.path, *wrong))
    return found


def drop_unused(config: Any, unused: Sequence[str]) -> tuple[Any, list[Trouble]]:
    """An `eval` stage without the models of optional stages that do not run.

    Troubles are told where `reference` or `baseline` names a model that is dropped.
    """
    if config.model_dump(include={"stage"})["stage"] != "eval":
        return config, []
    nested = config.model_dump(exclude_unset=True)
    gone = {
        str(reference.path[1]): reference.stage
        for reference in references(config)
        if reference.pattern == "models.*" and reference.stage in unused
    }
    if not gone:
        return config, []
    found = [
        Trouble(
            (key,),
            f"names `{nested[key]}` of the stage `{gone[nested[key]]}`, which does not run",
            f"add `--with {gone[nested[key]]}`, or name another model",
        )
        for key in ("reference", "baseline")
        if nested.get(key) in gone
    ]
    kept = {key: value for key, value in nested["models"].items() if key not in gone}
    if not kept:
        stages = " ".join(f"--with {stage}" for stage in sorted(set(gone.values())))
        message = "names only optional stages, and none of them runs"
        return config, [Trouble(("models",), message, f"add `{stages}`")]
    nested["models"] = kept
    nested["best_of"] = {key: k for key, k in config.best_of.items() if key not in gone}
    for trouble in found:
        del nested[trouble.key[0]]
    return type(config).model_validate(nested), found
