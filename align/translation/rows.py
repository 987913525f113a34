"""The sources of rows as other tools name them, as entries of `data.datasets`."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.data.exact import MARKS
from align.translation.work import Work

TRAIN, TEST = "train", "test"


def add_sources(work: Work, key: str, entries: list[dict[str, Any]]) -> None:
    """One source as `data.dataset_name`, several as `data.datasets`."""
    if len(entries) != 1 or entries[0].get("columns"):
        work.give("data.datasets", entries, key)
        return
    (entry,) = entries
    work.give("data.dataset_name", entry["path"], key)
    if entry.get("name"):
        work.give("data.dataset_config", entry["name"], key)
    if entry.get("split", "train") != "train":
        work.give("data.dataset_train_split", entry["split"], key)


def share_of(split: str, fraction: Any, work: Work, key: str) -> str:
    """A split cut to the share of its rows that a mixer takes: `train_sft[:25%]`."""
    if not isinstance(fraction, int | float) or isinstance(fraction, bool) or fraction in (1, 1.0):
        return split
    if not math.isfinite(fraction) or fraction <= 0 or fraction > 1:
        work.say(key, "changed", None, f"the share {fraction} of a source is no share: all rows")
        return split
    work.remark(key, "shares are the first rows of each source")
    return "+".join(f"{part}[:{fraction * 100:.10g}%]" for part in split.split("+"))


def mixer(work: Work) -> None:
    """alignment-handbook's `dataset_mixer`, `dataset_splits` and `dataset_configs`."""
    mix = work.take("dataset_mixer")
    splits, configs = work.take("dataset_splits"), work.take("dataset_configs")
    splits = splits if isinstance(splits, list) else ["train", "test"]
    train = [str(name) for name in splits if "train" in str(name)]
    test = [str(name) for name in splits if "test" in str(name)]
    odd = [str(name) for name in splits if str(name) not in train + test]
    entries = []
    for place, (path, fraction) in enumerate(mix.items() if isinstance(mix, Mapping) else ()):
        split = share_of("+".join(train) or "train", fraction, work, "dataset_mixer")
        entry: dict[str, Any] = {"path": str(path)}
        if isinstance(configs, list) and place < len(configs):
            entry["name"] = str(configs[place])
        entries.append({**entry, "split": split})
    if entries:
        add_sources(work, "dataset_mixer", entries)
    if "dataset_splits" in work.given:
        left = f"left out: {', '.join(odd)}" if odd else ""
        work.say("dataset_splits", "moved", "the splits of the sources", left)
    if "dataset_configs" in work.given:
        work.say("dataset_configs", "moved", "the configurations of the sources")
    if len(test) == 1 and "dataset_splits" in work.given:
        work.give("data.dataset_test_split", test[0], "dataset_splits", quiet=True)


def mixture(work: Work) -> None:
    """alignment-handbook's `dataset_mixture`: entries with `id`, and a held-out size."""
    mix = work.take("dataset_mixture")
    if not isinstance(mix, Mapping):
        work.say("dataset_mixture", "dropped", None, "is no mapping")
        return
    listed = mix.get("datasets")
    entries = [entry(work, item, "dataset_mixture") for item in listed or () if item]
    add_sources(work, "dataset_mixture", entries)
    size = mix.get("test_split_size")
    if size:
        work.give("data.test_split_size", size, "dataset_mixture", quiet=True)
    if "seed" in mix:
        work.remark("dataset_mixture", "its seed is left out: align draws with a fixed one")
    if any(isinstance(item, Mapping) and item.get("columns") for item in listed or ()):
        work.remark("dataset_mixture", "columns are recognised, not listed")


def entry(work: Work, item: Any, key: str) -> dict[str, Any]:
    """One source of a list: TRL's and the handbook's keys, a plain name, axolotl's keys."""
    if not isinstance(item, Mapping):
        return {"path": str(item)}
    path = item.get("path") or item.get("id") or item.get("name")
    files = item.get("data_files")
    if path in ("json", "csv", "parquet", "text", None) and files:
        path = files[0] if isinstance(files, list) else files
    found: dict[str, Any] = {"path": str(path)}
    config = item.get("config") if "id" in item else item.get("name")
    if config and config != path:
        found["name"] = str(config)
    split = str(item.get("split") or "train")
    found["split"] = share_of(split, item.get("weight"), work, key)
    if isinstance(item.get("columns"), Mapping):
        found["columns"] = dict(item["columns"])
    return found


def trl_list(work: Work) -> None:
    """TRL's `datasets`."""
    listed = work.take("datasets")
    if not isinstance(listed, list):
        work.say("datasets", "dropped", None, "is no list")
        return
    add_sources(work, "datasets", [entry(work, item, "datasets") for item in listed])


AXOLOTL_FORMS = {
    "alpaca": "alpaca",
    "sharegpt": "sharegpt",
    "completion": "text",
    "chat_template": "auto",
}
FIELDS = {
    "field_messages": "messages",
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "output",
    "field_system": "system",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
    "field_prompt": "prompt",
    "field_tools": "tools",
    "field": "text",
}


def axolotl_list(work: Work) -> None:
    """axolotl's `datasets`: the type is recognised, fields become columns."""
    listed = work.take("datasets")
    entries = []
    for item in listed if isinstance(listed, list) else ():
        if not isinstance(item, Mapping):
            continue
        found = entry(
            work, {key: value for key, value in item.items() if key != "columns"}, "datasets"
        )
        columns = {ours: item[theirs] for theirs, ours in FIELDS.items() if item.get(theirs)}
        form = item.get("type")
        if isinstance(form, Mapping):
            columns |= {ours: form[theirs] for theirs, ours in FIELDS.items() if form.get(theirs)}
            work.remark("datasets", "prompt texts of a type of its own are left out")
        elif form:
            work.remark("datasets", f"type `{form}`: the form of rows is recognised")
        mark = item.get("message_field_training")
        if mark and mark not in MARKS:
            known = ", ".join(f"`{name}`" for name in MARKS)
            work.remark(
                "datasets", f"marks in `{mark}` are not read: rename that key to one of {known}"
            )
        columns = {ours: str(theirs) for ours, theirs in columns.items() if ours != theirs}
        entries.append(found | ({"columns": columns} if columns else {}))
    if entries:
        add_sources(work, "datasets", entries)


def llamafactory_list(work: Work) -> None:
    """LLaMA-Factory's `dataset`: names of its dataset_info.json, looked up where that is here."""
    given = work.take("dataset")
    folder = work.take("dataset_dir")
    names = given if isinstance(given, list) else str(given or "").split(",")
    known = _registered(work.folder, str(folder or "data"))
    entries = []
    for name in (str(name).strip() for name in names):
        if not name:
            continue
        registered = known.get(name)
        if isinstance(registered, Mapping):
            entries.append(_looked_up(registered, str(folder or "data")))
            continue
        entries.append({"path": name})
        work.remark(
            "dataset",
            f"`{name}` is a name of LLaMA-Factory's dataset_info.json: give a file or Hub id instead",
        )
    if entries:
        add_sources(work, "dataset", entries)
    if "dataset_dir" in work.given:
        work.say("dataset_dir", "dropped", None, "files and Hub ids are named directly")


def _registered(beside: Path, folder: str) -> dict[str, Any]:
    for place in (Path(folder), beside / folder, beside / ".." / folder):
        file = place / "dataset_info.json"
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict):
            return found
    return {}


def _looked_up(item: Mapping[str, Any], folder: str) -> dict[str, Any]:
    hub, file = item.get("hf_hub_url"), item.get("file_name")
    found: dict[str, Any] = {"path": str(hub) if hub else str(Path(folder) / str(file))}
    if item.get("subset"):
        found["name"] = str(item["subset"])
    if item.get("split"):
        found["split"] = str(item["split"])
    ours = {
        "prompt": "instruction",
        "query": "input",
        "response": "output",
        "messages": "conversations",
    }
    given = item.get("columns")
    columns = {
        ours.get(name, name): str(column)
        for name, column in (given.items() if isinstance(given, Mapping) else ())
        if ours.get(name, name) != column
        and name
        in ("prompt", "query", "response", "messages", "chosen", "rejected", "system", "tools")
    }
    return found | ({"columns": columns} if columns else {})
