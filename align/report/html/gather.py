"""What the report knows of a run: its stages, as they lie in the folder. Reads files only, writes nothing.

Nothing outside the folder is needed: a run that was copied from the machine that made it reads the
same. Whatever is not there becomes a state and a reason, never an error.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import ValidationError

from align.config.fields import config_class
from align.config.references import FORM
from align.durable import read_json
from align.errors import fail
from align.lineage import Identity
from align.report.html.metrics import Metrics, read_metrics
from align.resources import display
from align.runs import ORIGINS_FILE
from align.stages import OUTSIDE, STAGES
from align.standing import standing
from align.status import PARTIAL, PIPELINE_FILE
from align.views import value_rows

State = Literal["complete", "changed", "damaged", "failed", "partial", "missing", "off"]


class Setting(NamedTuple):
    """A resolved value of a recipe."""

    key: str
    value: Any
    origin: str
    """`default`, `recipe.yaml:12`, `--set`, a flag, or `not kept`."""


@dataclass(frozen=True)
class Stage:
    """One stage: how it stands and where its files lie."""

    name: str
    kind: str
    state: State
    reasons: tuple[str, ...]
    home: Path
    """Its run folder, or that of its unfinished run."""
    needs: tuple[str, ...] = ()
    """Stages whose artifacts it reads."""
    models: Mapping[str, str] = field(default_factory=dict)
    """For an `eval` stage: name of a model in it -> the stage that made that model."""
    settings: tuple[Setting, ...] = ()

    @cached_property
    def lineage(self) -> Mapping[str, Any]:
        """Content of lineage.json."""
        return _mapping(self.home / "lineage.json")

    @cached_property
    def summary(self) -> Mapping[str, Any]:
        """Content of summary.json."""
        return _mapping(self.home / "summary.json")

    @cached_property
    def environment(self) -> Mapping[str, Any]:
        """Content of environment.json."""
        return _mapping(self.home / "environment.json")

    @cached_property
    def metrics(self) -> Metrics:
        """Content of metrics.jsonl."""
        return read_metrics(self.home / "metrics.jsonl")

    def artifact(self, name: str) -> Mapping[str, Any]:
        """A JSON file of the artifact; empty where it is not there."""
        return _mapping(self.home / "artifact" / name)

    def setting(self, key: str) -> Any:
        """A resolved value of its recipe; None where it is not known."""
        return next((found.value for found in self.settings if found.key == key), None)

    @property
    def exists(self) -> bool:
        """Whether anything of it lies in the folder."""
        return self.state in ("complete", "changed", "damaged") or bool(self.lineage)


@dataclass(frozen=True)
class Run:
    """A pipeline's folder, or one run with the runs that it stands on."""

    folder: Path
    title: str
    recipe: str | None
    """The pipeline file."""
    stages: tuple[Stage, ...]
    """In order, also those that did not run."""
    target: str | None = None
    """The stage that was asked for; None for a whole pipeline."""

    def stage(self, name: str) -> Stage | None:
        """The stage of a name."""
        return next((stage for stage in self.stages if stage.name == name), None)

    def of_kind(self, *kinds: str) -> list[Stage]:
        """Stages of some kinds that left something, in order."""
        return [stage for stage in self.stages if stage.kind in kinds and stage.exists]


def gather(folder: Path) -> Run:
    """Read a pipeline's folder, or the folder of one run.

    Raises:
        AlignError: the folder holds neither.
    """
    folder = folder.expanduser().absolute()
    kept = read_json(folder / PIPELINE_FILE)
    if isinstance(kept, dict) and isinstance(kept.get("stages"), dict):
        return _pipeline(folder, kept)
    home = _home(folder)
    if home is None:
        fail(
            "holds no run of align",
            where=display(folder),
            hint="name a pipeline's folder, as in `align report runs/tiny`, or a run folder",
        )
    return _single(home)


def short_path(text: str) -> str:
    """A path of this machine by its last two parts, which are the same wherever the run lies."""
    path = Path(text)
    return "/".join(("…", *path.parts[-2:])) if path.is_absolute() else text


def _mapping(file: Path) -> Mapping[str, Any]:
    found = read_json(file)
    return found if isinstance(found, dict) else {}


def _home(output: Path) -> Path | None:
    """Where the files of a run lie: its folder, or that of its unfinished run."""
    partial = output.with_name(f"{output.name}.partial")
    return next((place for place in (output, partial) if _mapping(place / "lineage.json")), None)


# --- a pipeline ------------------------------------------------------------------------------


def _pipeline(folder: Path, kept: Mapping[str, Any]) -> Run:
    stages: list[Stage] = []
    for name, told in kept["stages"].items():
        stages.append(_stage_of_pipeline(folder, name, told, kept.get("chosen", ()), stages))
    recipe = kept.get("recipe")
    title = "/".join(folder.parts[-2:])
    return Run(folder, title, short_path(recipe) if recipe else None, tuple(stages))


def _stage_of_pipeline(
    folder: Path, name: str, told: Mapping[str, Any], chosen: Any, before: list[Stage]
) -> Stage:
    output = folder / name
    home = _home(output) or output
    needs = tuple(told.get("needs", ()))
    state, reasons = _state(home, output, told.get("failure"))
    if name not in chosen and state in ("missing", "failed"):
        state, reasons = "off", ()
    elif state == "missing":
        stops = ("failed", "partial")
        stop = next((s for s in before if s.state in stops and s.kind not in OUTSIDE), None)
        reasons = (f"the pipeline stopped at `{stop.name}`" if stop else "it has not run yet",)
    elif state == "complete":
        others = {stage.name: stage for stage in before if stage.state != "missing"}
        stale = [need for need in needs if need in others and not _built_on(home, others[need])]
        if stale:
            reasons = tuple(f"it was built on another `{need}` than the one here" for need in stale)
            state = "changed"
    given = told.get("config", {})
    models = {
        model: match[1]
        for model, path in given.get("models", {}).items()
        if (match := FORM.fullmatch(str(path)))
    }
    kind = str(told.get("kind"))
    settings = _settings(kind, given, told.get("origins"))
    return Stage(name, kind, state, reasons, home, needs, models, settings)


def _state(home: Path, output: Path, failure: str | None) -> tuple[State, tuple[str, ...]]:
    lineage = _mapping(home / "lineage.json")
    if home == output and "outputs" in lineage:
        found = standing(output, Identity({}, lineage.get("parts", {})))
        return ("damaged", found.reasons) if found.state == "damaged" else ("complete", ())
    if failure:
        return "failed", (failure,)
    if lineage:
        return "partial", ("it was stopped, or is still running",)
    return "missing", ()


def _hashes(lineage: Mapping[str, Any]) -> set[str]:
    """What a run left, by content: its artifact as a whole, and every file in it."""
    outputs = lineage.get("outputs") or {}
    files = {str(facts.get("sha256")) for facts in outputs.get("files", {}).values()}
    return files | {str(outputs.get("artifact"))}


def _built_on(home: Path, other: Stage) -> bool:
    left = _hashes(other.lineage)
    inputs = _mapping(home / "lineage.json").get("inputs", [])
    return any(facts.get("sha256") in left for facts in inputs)


# --- one run ---------------------------------------------------------------------------------


def _single(home: Path) -> Run:
    """A run, the runs that it stands on, and the evaluations beside it that measured it."""
    beside = sorted(file.parent for file in home.parent.glob("*/lineage.json"))
    order = list(_way(home, beside, {}))
    left = _hashes(_mapping(home / "lineage.json")) - {"None"}
    for place in beside:
        lineage = _mapping(place / "lineage.json")
        inputs = lineage.get("inputs", [])
        models = {i.get("sha256") for i in inputs if str(i.get("key")).startswith("models.")}
        if lineage.get("stage") == "eval" and "outputs" in lineage and left & models:
            order += [place] if place not in order else []
    names = {place: PARTIAL.sub("", place.name) for place in order}
    stages = tuple(_stage_of_run(place, names) for place in order)
    return Run(home, "/".join(home.parts[-2:]), None, stages, names[home])


def _way(home: Path, beside: list[Path], seen: dict[Path, None]) -> Iterator[Path]:
    """The runs that a run stands on, earliest first, then itself."""
    if home in seen:
        return
    seen[home] = None
    for _, place in _parents(home, beside):
        yield from _way(place, beside, seen)
    yield home


def _parents(home: Path, beside: list[Path]) -> Iterator[tuple[str, Path]]:
    """Key and run folder of every input that a run of align left, found by content.

    Looked for beside this run first, in case that both were copied, then where the input lay.
    """
    for facts in _mapping(home / "lineage.json").get("inputs", []):
        if "sha256" not in facts:
            continue
        given = Path(str(facts.get("path")))
        for place in (*beside, given, *given.parents[:3]):
            if place != home and facts["sha256"] in _hashes(_mapping(place / "lineage.json")):
                yield str(facts.get("key")), place
                break


def _stage_of_run(home: Path, names: Mapping[Path, str]) -> Stage:
    lineage = _mapping(home / "lineage.json")
    parents = [(key, names[place]) for key, place in _parents(home, list(names)) if place in names]
    output = home.with_name(names[home])
    state, reasons = _state(home, output, None)
    kind = str(lineage.get("stage"))
    try:
        given = yaml.safe_load((home / "recipe.yaml").read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError):
        given = {}
    origins = read_json(home / ORIGINS_FILE)
    return Stage(
        names[home],
        kind,
        state,
        reasons,
        home,
        tuple(dict.fromkeys(name for _, name in parents)),
        {key.removeprefix("models."): name for key, name in parents if key.startswith("models.")},
        _settings(kind, given, origins if isinstance(origins, dict) else None),
    )


# --- settings --------------------------------------------------------------------------------


class _Origins(dict[str, str]):
    def __missing__(self, key: str) -> str:
        return "default"


def _settings(
    kind: str, given: Mapping[str, Any], origins: Mapping[str, str] | None
) -> tuple[Setting, ...]:
    """Every value of a stage's recipe; without kept origins, what differs from its default is marked so."""
    if kind not in STAGES:
        return ()
    try:
        config = config_class(kind).model_validate(given)
    except ValidationError:  # written by another version of align
        flat = [(key, value) for key, value in given.items() if key != "stage"]
        return tuple(Setting(key, value, "not kept") for key, value in flat)
    rows = value_rows(config, _Origins(origins or {}))
    if origins is None:
        from align.config.fields import leaf_fields

        defaults = {leaf.name: leaf.default for leaf in leaf_fields(config_class(kind))}
        rows = [
            (key, value, "default" if value == defaults.get(key) else "not kept")
            for key, value, _ in rows
        ]
    return tuple(Setting(*row) for row in rows)
