"""Which model a name in a recipe means, as far as files here and shapes known offline tell."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config.yaml import read
from align.errors import AlignError
from align.plan.shapes import Shape, find_shape, known
from align.resources import exists, find_path

MOST_STEPS = 8
"""Recipes that are followed from one to the next."""


@dataclass(frozen=True)
class Origin:
    """A model that a stage starts from."""

    label: str
    shape: Shape | None
    """None where nobody can know it yet."""
    dtype: str = "bfloat16"
    """Type of its saved weights."""
    adapter: int = 0
    """Parameters of an adapter on it."""
    download: str | None = None
    """The Hub id, where the weights are not here."""


def find_origin(name: str, folder: Path, *, steps: int = 0) -> Origin:
    """The model behind a folder, a Hub id, or a run that another recipe beside this one will write.

    Raises:
        AlignError: a Hub id whose shape is not known offline.
    """
    place = Path(name).expanduser()
    if exists(place / "adapter_config.json"):
        return _adapter(place, name, folder, steps)
    if exists(place / "config.json"):
        shape = find_shape(name)
        dtype = shape.config.get("dtype") or shape.config.get("torch_dtype") or "float32"
        return Origin(name, shape, str(dtype))
    if known(name) is not None:
        return Origin(name, known(name), download=name if "/" in name else None)
    if "artifact" in place.parts:
        return _from_recipes(name, folder, steps)
    found = find_path(name, beside=folder)
    if found is not None and found.is_dir() and (found / "config.json").is_file():
        return find_origin(str(found), folder)
    return Origin(name, find_shape(name), download=name)


def _adapter(place: Path, name: str, folder: Path, steps: int) -> Origin:
    try:
        facts = json.loads((place / "adapter_config.json").read_text(encoding="utf-8"))
        base = find_origin(str(facts["base_model_name_or_path"]), folder, steps=steps + 1)
        rank, targets = int(facts.get("r", 16)), facts.get("target_modules") or "all-linear"
    except (OSError, ValueError, KeyError, TypeError):
        return Origin(name, None)
    count = base.shape.adapter(rank, targets) if base.shape else 0
    return Origin(name, base.shape, base.dtype, count, base.download)


def _from_recipes(name: str, folder: Path, steps: int) -> Origin:
    """A run that is not there yet: the recipe beside this one that writes it says its base."""
    run = _parent(Path(name))
    for file in sorted(folder.glob("*.y*ml")) if steps < MOST_STEPS else ():
        try:
            data = read(file, file.name).data
        except AlignError:
            continue
        output: Any = data.get("output_dir")
        model = data.get("model")
        base = model.get("model_name_or_path") if isinstance(model, dict) else None
        if isinstance(output, str) and isinstance(base, str) and _ends(run, Path(output)):
            found = find_origin(base, folder, steps=steps + 1)
            dtype = str(model.get("dtype", found.dtype)) if isinstance(model, dict) else found.dtype
            plain = found.dtype if dtype == "auto" else dtype
            return Origin(name, found.shape, plain)
    return Origin(name, None)


def _parent(path: Path) -> Path:
    place = path.parts.index("artifact")
    return Path(*path.parts[:place])


def _ends(run: Path, output: Path) -> bool:
    """Whether a run folder is the one that a recipe writes (`runs/x/sft`, absolute or not)."""
    parts = output.parts
    return len(parts) > 0 and run.parts[-len(parts) :] == parts
