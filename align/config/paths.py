"""Keys of a recipe that name a file, a folder or a Hub id, and how they become usable paths.

What exists on this machine (see `align.resources.find_path`) becomes an absolute path. What cannot
be anything but a path and does not exist is a problem. The rest is taken for a Hub id.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from align.config.problems import KeyPath
from align.config.suggest import nearest
from align.resources import SUFFIXES, accelerate_config, accelerate_names, exists, find_path

MODEL_KEYS = (
    "model.model_name_or_path",
    "model.adapter_name_or_path",
    "model.tokenizer_name_or_path",
    "scorer.reward_model",
    "reward_model",
    "models.*",
    "run",
)
"""Keys that name a model folder or a Hub id; `run` a run folder."""

DATA_KEYS = ("data.dataset_name", "data.datasets.*.path")
"""Keys that name rows: a file, a folder, a shipped data set or a Hub id."""

FILE_KEYS = ("model.chat_template_path", "launch.accelerate")
"""Keys that name a file, or something that ships under a short name."""

PATH_KEYS = (*MODEL_KEYS, *DATA_KEYS, *FILE_KEYS)

DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".arrow", ".txt", ".gz", ".zst")
HUB_ID = re.compile(r"(?:[\w.-]+/)?[\w.-]{1,96}")
TEMPLATES = Path(__file__).parent.parent / "models" / "templates"


class Trouble(NamedTuple):
    """Something wrong with the value of one key."""

    key: KeyPath
    message: str
    hint: str | None = None
    others: tuple[str, ...] = ()
    """Further dotted keys that take part; when one of these is wrong itself, this is not told."""
    pending: bool = False
    """A run that is not there yet: the recipe is right, and cannot start now."""


def values_at(nested: Any, pattern: str) -> Iterator[tuple[KeyPath, Any]]:
    """Path and value of everything a dotted pattern (`models.*`) leads to in nested plain data."""
    head, _, rest = pattern.partition(".")
    keys: list[Any] = []
    if isinstance(nested, Mapping):
        keys = list(nested) if head == "*" else [head] if head in nested else []
    elif isinstance(nested, list) and head == "*":
        keys = list(range(len(nested)))
    for key in keys:
        if not rest:
            yield (key,), nested[key]
        else:
            for path, value in values_at(nested[key], rest):
                yield (key, *path), value


def path_values(nested: Any) -> Iterator[tuple[str, KeyPath, str]]:
    """Pattern, path and text of every path-like value of a stage's nested data."""
    for pattern in PATH_KEYS:
        for path, value in values_at(nested, pattern):
            if isinstance(value, str):
                yield pattern, path, value


def put(nested: Any, path: KeyPath, value: Any) -> None:
    """Set the value at an existing path of nested plain data."""
    for key in path[:-1]:
        nested = nested[key]
    nested[path[-1]] = value


def _only_a_path(name: str, suffixes: tuple[str, ...]) -> bool:
    return (
        name.startswith((".", "/", "~"))
        or name.endswith("/")
        or name.count("/") > 1
        or "\\" in name
        or name.lower().endswith(suffixes)
    )


def locate(pattern: str, path: KeyPath, name: str, beside: Path) -> str | Trouble:
    """The usable form of one path-like value, or what is wrong with it."""
    if pattern == "launch.accelerate":
        return _locate_accelerate(path, name, beside)
    if pattern == "model.chat_template_path" and exists(TEMPLATES / f"{name}.jinja"):
        return name
    is_data = pattern in DATA_KEYS
    found = find_path(name, beside=beside, rooms=("datasets",) if is_data else ())
    if found:
        return str(found)
    if pattern == "run":
        hint = "run the stage that writes it first"
        return Trouble(path, "is not there yet", hint, pending=True)
    if pattern == "model.chat_template_path":
        known = ", ".join(f"`{file.stem}`" for file in sorted(TEMPLATES.glob("*.jinja")))
        return Trouble(path, "names no file", f"name a Jinja file, or a shipped template: {known}")
    if _only_a_path(name, DATA_SUFFIXES if is_data else ()):
        if "artifact" in Path(name).parts:
            hint = "run the stage that writes it first"
            return Trouble(path, "is not there yet", hint, pending=True)
        places = " and ".join(dict.fromkeys(map(str, (Path.cwd(), beside))))
        return Trouble(path, "names no file or folder", f"looked in {places}")
    if not HUB_ID.fullmatch(name):
        hint = "a Hub id has the form `org/name`"
        return Trouble(path, "is neither a file or folder here nor a Hub id", hint)
    return _near_a_folder(path, name, beside) or name


def _near_a_folder(path: KeyPath, name: str, beside: Path) -> Trouble | None:
    """What is wrong with `runs/tinny` where the folder `runs` is here: that is no Hub id."""
    first, slash, rest = name.partition("/")
    places = (Path.cwd() / first, beside / first)
    folder = next((place for place in places if exists(place) and place.is_dir()), None)
    if not slash or not folder:
        return None
    close = nearest(rest, [entry.name for entry in folder.iterdir()])
    hint = f"did you mean `{first}/{close}`?" if close else f"looked in {folder}"
    hint += f" (for a Hub id, work where there is no folder `{first}`)"
    return Trouble(path, "names no file or folder", hint)


def _locate_accelerate(path: KeyPath, name: str, beside: Path) -> str | Trouble:
    if name in accelerate_names():
        return name
    found = accelerate_config(name, beside=beside)
    if found:
        return str(found)
    close = nearest(name.removesuffix(SUFFIXES[0]), accelerate_names())
    names = ", ".join(f"`{known}`" for known in accelerate_names())
    hint = f"did you mean `{close}`?" if close else f"name a file, or a shipped config: {names}"
    return Trouble(path, "names no accelerate config", hint)
