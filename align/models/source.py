"""What a user calls a model: a run folder, a stage's name, an adapter, a model folder or a Hub id.

Light: reads JSON and YAML files only.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from align.durable import read_json
from align.errors import fail

RUNS = Path("runs")
"""Where a stage that is named without its folder is looked for."""
LEAVES_MODEL = frozenset({"sft", "reward", "dpo", "ppo", "average"})


@dataclass(frozen=True)
class Source:
    """A model by its path, and what is known of the run that made it."""

    path: str
    """Folder or Hub id of a model or an adapter."""
    name: str
    """What it is called in a heading."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """The recipe of its training (see `trained_by`); empty for what is no run."""

    @property
    def system_prompt(self) -> str | None:
        """The system text that the run trained with."""
        found = (self.recipe.get("data") or {}).get("system_prompt")
        return str(found) if found else None

    @property
    def in_4bit(self) -> bool:
        """Whether the run trained on a base in 4 bits."""
        return bool((self.recipe.get("model") or {}).get("load_in_4bit"))


def artifact_of(source: str) -> tuple[str, dict[str, Any]]:
    """The model that a run folder holds, and the run's recipe; a model folder names itself."""
    run = Path(source).expanduser()
    recipe = run / "recipe.yaml"
    if not (run / "artifact").is_dir() or not recipe.is_file():
        beside = run.parent / "recipe.yaml"
        if run.name != "artifact" or not beside.is_file():
            return source, {}
        run, recipe = run.parent, beside
    return str(run / "artifact"), yaml.safe_load(recipe.read_text(encoding="utf-8"))


def trained_by(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe that says on what a run's model was trained: of an average, its first member's.

    Empty where that member is no run, or is not there any more.
    """
    passed: list[dict[str, Any]] = []
    while recipe.get("stage") == "average" and recipe not in passed:
        passed.append(recipe)  # a folder may hold another run by now: no circles
        recipe = artifact_of(str(next(iter((recipe.get("models") or {"": ""}).values()))))[1]
    return {} if recipe in passed else recipe


def find_model(given: str) -> Source:
    """The model that a user names.

    Args:
        given: a run folder (its artifact is meant), a model's or adapter's folder, the bare name of
            a finished stage below `runs/`, or a Hub id.

    Raises:
        AlignError: an unfinished run, a pipeline's folder, a stage that leaves no model, or a name
            that several runs have. Whether a folder holds a model is seen when it is loaded.
    """
    folder = Path(given).expanduser()
    if not folder.exists():
        _refuse_unfinished(folder)
        folder = _stage_named(given) or folder
    if not folder.exists():
        return Source(given, given.rstrip("/").rpartition("/")[2])
    stages = (read_json(folder / "pipeline.json") or {}).get("stages")
    if stages:
        names = [name for name, stage in stages.items() if stage.get("kind") in LEAVES_MODEL]
        finished = [str(folder / name) for name in names if (folder / name / "artifact").is_dir()]
        fail(
            "is the folder of a pipeline: say which stage",
            where=given,
            hint=f"one of {', '.join(finished)}" if finished else "none of its models is finished",
        )
    path, recipe = artifact_of(str(folder))
    kind = recipe.get("stage")
    if kind is not None and kind not in LEAVES_MODEL:
        fail(
            f"is a run of `align {kind}`, which leaves no model",
            where=given,
            hint="name a run of sft, dpo, ppo or average",
        )
    run = Path(path).absolute()
    return Source(path, (run.parent if recipe else run).name, trained_by(recipe))


def _refuse_unfinished(folder: Path) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    if partial.is_dir():
        fail(
            "is an unfinished run",
            where=str(folder),
            hint="the command that began it goes on with it; a model is there when it is through",
        )


def _stage_named(given: str) -> Path | None:
    """The one finished run below `runs/` whose folder has this name."""
    if not re.fullmatch(r"\w[\w.-]*(?:@\d+)?", given):
        return None
    places = [RUNS / given, *sorted(RUNS.glob(f"*/{given}"))]
    found = [place for place in places if (place / "artifact").is_dir()]
    if len(found) > 1:
        fail(
            f"several runs are called `{given}`",
            where=given,
            hint=f"name one of {', '.join(map(str, found))}",
        )
    return found[0] if found else None


def two_names(first: Source, second: Source) -> tuple[str, str]:
    """What two models are called side by side: never the same."""
    if first.name != second.name:
        return first.name, second.name
    longer = []
    for source in (first, second):
        parts = Path(source.path).parts
        parts = parts[:-1] if parts[-1] == "artifact" else parts
        longer.append("/".join(parts[-2:]))
    if longer[0] != longer[1]:
        return longer[0], longer[1]
    return f"{first.name} (A)", f"{second.name} (B)"
