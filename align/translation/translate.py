"""A recipe of another tool as one of ours, with a note on what became of every key."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config.names import DPO_LOSSES
from align.config.yaml import Document
from align.errors import fail
from align.resources import exists
from align.translation import (
    axolotl_rules,
    llamafactory_rules,
    ppo_rules,
    pushing,
    rows,
    trl_rules,
)
from align.translation.kinds import TITLES, Tool, stage_of, tool_of
from align.translation.rules import Changed, Drop, Extra, Joint, Lost, Note, Rules, To
from align.translation.work import Work

TABLES: dict[Tool, Rules] = {
    "handbook": trl_rules.RULES,
    "trl": trl_rules.RULES,
    "llamafactory": llamafactory_rules.RULES,
    "axolotl": axolotl_rules.RULES,
}
DEFAULTS: dict[Tool, Mapping[str, Mapping[str, Any]]] = {
    "handbook": trl_rules.DEFAULTS,
    "trl": trl_rules.DEFAULTS,
    "llamafactory": llamafactory_rules.DEFAULTS,
    "axolotl": axolotl_rules.DEFAULTS,
}


SHIPPED_TEMPLATES = ("llama3", "llama3.1", "llama3.2")


@dataclass(frozen=True)
class Translation:
    """A recipe of another tool in our words."""

    tool: Tool
    stage: str
    values: dict[str, Any]
    """Our dotted key -> value."""
    sources: dict[str, str]
    """Our dotted key -> their key that it comes from."""
    notes: list[Note]

    def document(self, theirs: Document) -> Document:
        """The values as a document whose lines are those of the file they come from."""
        data: dict[str, Any] = {"stage": self.stage}
        lines: dict[tuple[str | int, ...], int] = {}
        texts: dict[tuple[str | int, ...], str] = {}
        for ours, value in self.values.items():
            data[ours] = value
            source = self.sources.get(ours)
            if source is None:
                continue
            for path, line in theirs.lines.items():
                if path[0] == source and (len(path) == 1 or theirs.data[source] == value):
                    lines[ours, *path[1:]] = line
            if theirs.data.get(source) == value:
                found = {p: text for p, text in theirs.texts.items() if p[0] == source}
                texts |= {(ours, *path[1:]): text for path, text in found.items()}
        return Document(theirs.name, data, lines, texts, theirs.problems)


def translate(
    document: Document, file: Path, *, tool: Tool | None = None, stage: str | None = None
) -> Translation:
    """Turn the recipe of another tool into ours.

    Args:
        document: the file as it was read.
        file: its path; names of folders may tell the method, data paths may stand beside it.
        tool: whose file it is; told from its keys when None.
        stage: what it trains; told from its keys and names when None.

    Raises:
        AlignError: nobody's keys, no telling what it trains, or a method that is not offered.
    """
    found = tool or tool_of(document.data)
    if found is None:
        known = ", ".join(TITLES)
        ours = "stages" in document.data or "stage" in document.data
        message = (
            "is a recipe of align already" if ours else "has the keys of no tool that is known"
        )
        hint = "run it, or check it with `align validate`" if ours else f"name it: --from {known}"
        fail(message, where=document.name, hint=hint)
    kind = stage_of(found, document.data, file, document.name, stage)
    work = Work(found, kind, document, file.absolute().parent)
    table = TABLES[found]
    if kind == "ppo":
        table = {**table, **ppo_rules.TABLES[found]}
    for key in sorted(document.data, key=lambda key: _turn(work, key, table)):
        if key not in work.taken:
            _one(work, key, table)
    _fill(work)
    _hold_out(work)
    return Translation(found, kind, work.data, work.sources, work.finished())


def _turn(work: Work, key: str, table: Rules) -> int:
    """When a key is read: PPO's joint keys first; then those that are called so here too, since of two names for one
    thing ours wins."""
    if work.stage == "ppo" and key in ppo_rules.JOINT:
        return 0
    rule = table.get(key)
    target = rule.key if isinstance(rule, To) else key
    return 1 if target.rpartition(".")[2] == key else 2


def _one(work: Work, key: str, table: Rules) -> None:
    rule = table.get(key)
    ours = work.ours(key)
    if isinstance(rule, Joint):
        if work.stage == "ppo" and key in ppo_rules.JOINT:
            ppo_rules.JOINT[key](work)
            return
        JOINT[work.tool, key](work) if (work.tool, key) in JOINT else JOINT["", key](work)
        return
    value = work.take(key)
    if isinstance(rule, Drop):
        work.say(key, "dropped", None, rule.because)
    elif isinstance(rule, Extra):
        if work.stage in rule.stages and value is not None:
            work.extra(key, value)
        else:
            reason = "nothing is given" if value is None else f"no argument of `{work.stage}`"
            work.say(key, "dropped", None, reason)
    elif isinstance(rule, To):
        _moved(work, key, rule, value)
    elif ours is None:
        work.say(key, "unknown", None, "no key of align or of the tool that is known; left out")
    elif value is None and work.leaves[ours].default is not None:
        work.say(key, "dropped", None, "nothing is given; the default stays")
    else:
        work.give(ours, value, key)


def _moved(work: Work, key: str, rule: To, value: Any) -> None:
    try:
        new = rule.change(value) if rule.change else value
    except Lost as lost:
        work.say(key, "dropped", None, str(lost))
        return
    if isinstance(new, Changed):
        work.give(rule.key, new.value, key, new.because)
    elif new is None:
        work.say(key, "dropped", None, "nothing is given; the default stays")
    else:
        work.give(rule.key, new, key)


# --- keys that are read together ------------------------------------------------------------


def _template(work: Work) -> None:
    """A Jinja text or a file; the names of axolotl's templates have no file here."""
    for key in ("chat_template", "chat_template_path", "chat_template_jinja"):
        value = work.take(key)
        if key not in work.given:
            continue
        if isinstance(value, str) and ("{%" in value or "{{" in value):
            work.give("model.chat_template", value, key)
        elif isinstance(value, str) and (
            key.endswith("path") or value.endswith(".jinja") or value in SHIPPED_TEMPLATES
        ):
            work.give("model.chat_template_path", value, key)
        else:
            work.say(key, "dropped", None, f"`{value}`: the tokenizer's own template is used")


def _dataset_name(work: Work) -> None:
    value = work.take("dataset_name")
    if "dataset_mixer" in work.given or "dataset_mixture" in work.given:
        work.say("dataset_name", "dropped", None, "overruled by the mixture")
    elif value is None:
        work.say("dataset_name", "dropped", None, "nothing is given")
    else:
        work.give("data.dataset_name", value, "dataset_name")


def _text_column(work: Work) -> None:
    """The column of plain texts; chats are recognised."""
    for key in ("dataset_text_field", "text_column"):
        value = work.take(key)
        if key not in work.given:
            continue
        if (
            isinstance(value, str)
            and value not in ("text", "messages", "prompt")
            and work.stage == "sft"
        ):
            work.give("data.columns", {"text": value}, key)
        else:
            work.say(key, "dropped", None, "the form of the rows is recognised")


def _checkpointing(work: Work) -> None:
    value = work.take("gradient_checkpointing_kwargs")
    rest = dict(value) if isinstance(value, Mapping) else {}
    rest.pop("use_reentrant", None)
    if rest:
        work.extra("gradient_checkpointing_kwargs", rest)
    else:
        reason = "the non-reentrant form is used; the gradients are the same"
        work.say("gradient_checkpointing_kwargs", "dropped", None, reason)


def _loss_type(work: Work) -> None:
    """DPO's losses by TRL's present names; SFT has a `loss_type` of another kind."""
    value = work.take("loss_type")
    if work.stage == "sft":
        if value in ("nll", "dft"):
            work.give("trainer.loss_type", value, "loss_type")
        else:
            work.say("loss_type", "dropped", None, f"`{value}`: `nll` gives the same loss")
        return
    listed = value if isinstance(value, list) else [value]
    known = [loss for loss in listed if loss in DPO_LOSSES]
    if known == listed:
        work.give("loss_type", value, "loss_type")
    else:
        gone = ", ".join(f"`{loss}`" for loss in listed if loss not in DPO_LOSSES)
        work.say("loss_type", "dropped", None, f"TRL has no {gone} any more; `sigmoid` is used")


def _llamafactory_stage(work: Work) -> None:
    work.take("stage")
    work.say("stage", "kept" if work.given["stage"] == work.stage else "renamed", "stage")


def _finetuning_type(work: Work) -> None:
    value = work.take("finetuning_type")
    if value in ("lora", "full"):
        work.give("lora.use_peft", value == "lora", "finetuning_type")
    else:
        reason = f"`{value}` is not offered: LoRA is trained instead"
        work.give("lora.use_peft", True, "finetuning_type", reason)


def _bits(work: Work) -> None:
    value = work.take("quantization_bit")
    if value in (4, 8):
        work.give(f"model.load_in_{value}bit", True, "quantization_bit")
    else:
        work.say("quantization_bit", "dropped", None, f"`{value}`: align quantizes to 4 or 8 bits")


def _llamafactory_template(work: Work) -> None:
    value = work.take("template")
    if value == "llama3":
        work.give("model.chat_template_path", "llama3", "template")
    else:
        work.say("template", "dropped", None, f"`{value}`: the tokenizer's own template is used")


def _liger(work: Work) -> None:
    work.extra("use_liger_kernel", bool(work.take("enable_liger_kernel")))


def _eval_dataset(work: Work) -> None:
    work.take("eval_dataset")
    reason = "give a split of the same source with `data.dataset_test_split`"
    work.say("eval_dataset", "dropped", None, reason)


def _adapter(work: Work) -> None:
    value = work.take("adapter")
    if value in ("lora", "qlora"):
        work.give("lora.use_peft", True, "adapter")
        if value == "qlora" and not work.given.get("load_in_4bit"):
            work.add("model.load_in_4bit", True, "`adapter: qlora` quantizes the base")
    else:
        work.say("adapter", "dropped", None, f"`{value}`: all parameters are trained")


def _rl(work: Work) -> None:
    value = work.take("rl")
    if value == "ipo":
        work.give("loss_type", "ipo", "rl")
    else:
        work.say("rl", "moved", "stage")


def _reward_switch(work: Work) -> None:
    work.take("reward_model")
    if work.stage == "reward":
        work.say("reward_model", "moved", "stage")
    else:
        work.say("reward_model", "dropped", None, "off")


def _test_datasets(work: Work) -> None:
    work.take("test_datasets")
    reason = "give a split of the same source with `data.dataset_test_split`"
    work.say("test_datasets", "dropped", None, reason)


def _wandb(work: Work) -> None:
    value = work.take("use_wandb")
    if value:
        work.give("trainer.report_to", "wandb", "use_wandb")
    else:
        work.say("use_wandb", "dropped", None, "off")


Step = Callable[[Work], None]

JOINT: dict[tuple[str, str], Step] = {
    **pushing.JOINT,
    **dict.fromkeys(
        (("", key) for key in ("chat_template", "chat_template_path", "chat_template_jinja")),
        _template,
    ),
    ("", "dataset_name"): _dataset_name,
    ("", "dataset_text_field"): _text_column,
    ("", "text_column"): _text_column,
    ("", "gradient_checkpointing_kwargs"): _checkpointing,
    ("", "loss_type"): _loss_type,
    ("", "dataset_mixer"): rows.mixer,
    ("", "dataset_splits"): rows.mixer,
    ("", "dataset_configs"): rows.mixer,
    ("", "dataset_mixture"): rows.mixture,
    ("", "datasets"): rows.trl_list,
    ("llamafactory", "stage"): _llamafactory_stage,
    ("llamafactory", "finetuning_type"): _finetuning_type,
    ("llamafactory", "quantization_bit"): _bits,
    ("llamafactory", "template"): _llamafactory_template,
    ("llamafactory", "enable_liger_kernel"): _liger,
    ("llamafactory", "dataset"): rows.llamafactory_list,
    ("llamafactory", "dataset_dir"): rows.llamafactory_list,
    ("llamafactory", "eval_dataset"): _eval_dataset,
    ("axolotl", "datasets"): rows.axolotl_list,
    ("axolotl", "adapter"): _adapter,
    ("axolotl", "rl"): _rl,
    ("axolotl", "reward_model"): _reward_switch,
    ("axolotl", "test_datasets"): _test_datasets,
    ("axolotl", "use_wandb"): _wandb,
}
"""Tool (or none for all) and key -> the function that reads it."""


# --- what their file leaves to defaults that are not ours -----------------------------------


def _fill(work: Work) -> None:
    """Write the other tool's defaults out where ours are others, so that the run stays the same."""
    title, table = TITLES[work.tool], DEFAULTS[work.tool]
    reason = f"{title}'s default"
    if work.stage == "ppo":
        ppo_rules.fill(work, title)
    for ours, value in {**table.get("", {}), **table.get(work.stage, {})}.items():
        work.add(ours, value, reason)
    if not work.data.get("lora.use_peft", True):
        return
    if work.tool == "llamafactory":
        work.add("lora.lora_r", llamafactory_rules.ADAPTER_DEFAULTS["lora.lora_r"], reason)
        work.add("lora.lora_alpha", 2 * int(work.data["lora.lora_r"]), f"{title}: twice the rank")
    elif work.tool in ("trl", "handbook"):
        for ours, value in trl_rules.ADAPTER_DEFAULTS.items() if work.stage != "ppo" else ():
            work.add(ours, value, reason)
        if work.data.get("model.load_in_4bit"):
            for ours, value in trl_rules.QUANTIZED_DEFAULTS.items():
                work.add(ours, value, reason)


def _hold_out(work: Work) -> None:
    """Evaluation during training needs rows: theirs may stand in a split that is only implied."""
    if work.tool == "axolotl" and "trainer.eval_steps" in work.data:
        work.add("trainer.eval_strategy", "steps", "`eval_steps` is given")
    if work.data.get("trainer.eval_strategy", "no") == "no":
        return
    if {"data.test_split_size", "data.dataset_test_split"} & set(work.data):
        return
    name = str(work.data.get("data.dataset_name", ""))
    local = exists(work.folder / name) or exists(Path(name))
    if work.tool in ("trl", "handbook") and name and not local:
        work.add("data.dataset_test_split", "test", f"{TITLES[work.tool]}'s default")
        return
    source = work.sources.pop("trainer.eval_strategy", "eval_strategy")
    del work.data["trainer.eval_strategy"]
    work.notes = [note for note in work.notes if note.to != "trainer.eval_strategy"]
    reason = "no rows are held out; set `data.test_split_size` with it"
    work.say(source, "dropped", None, reason)
