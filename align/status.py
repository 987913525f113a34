"""Where a pipeline or a run stands: states, sizes on disk, key metrics. Writes nothing."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from align.config.fields import config_class
from align.config.load import LoadedPipeline
from align.config.pushing import asked_of, kind_of
from align.config.references import references, substitute
from align.config.sections import StageConfig
from align.durable import folder_size, read_json
from align.errors import AlignError, fail
from align.lineage import Identity, identify
from align.locks import writer_of
from align.pushes import is_pushed
from align.runs import output_path, partial_path
from align.standing import standing

State = Literal["complete", "changed", "damaged", "foreign", "partial", "failed", "missing", "off"]

PIPELINE_FILE = "pipeline.json"


@dataclass(frozen=True)
class Plan:
    """A pipeline's stages with their configs; `$name` is still in them."""

    output: Path
    recipe: str
    """The file it was read from."""
    configs: Mapping[str, StageConfig]
    """Every stage in order, also the optional ones that do not run."""
    chosen: tuple[str, ...]
    """The stages that run, in order."""
    origins: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Stage -> dotted key -> where its value came from; empty for a plan that was read back."""

    @classmethod
    def of(cls, loaded: LoadedPipeline) -> "Plan":
        """The plan of a pipeline file."""
        configs = {name: stage.config for name, stage in loaded.config.stages.items()}
        output = Path(loaded.config.output_dir).expanduser().absolute()
        origins = {name: stage.origins for name, stage in loaded.stages.items()}
        return cls(output, str(loaded.path), configs, tuple(loaded.chosen), origins)

    @classmethod
    def read(cls, folder: Path) -> "Plan":
        """The plan that `align run` left in a pipeline's folder."""
        kept = read_json(folder / PIPELINE_FILE)
        if not isinstance(kept, dict) or "stages" not in kept:
            fail(
                "is no folder of a pipeline",
                where=str(folder),
                hint=f"name a pipeline file, or a folder that holds {PIPELINE_FILE}",
            )
        configs = {
            name: config_class(stage["kind"]).model_validate(stage["config"])
            for name, stage in kept["stages"].items()
        }
        return cls(folder.absolute(), kept["recipe"], configs, tuple(kept["chosen"]))

    def needs(self, name: str) -> tuple[str, ...]:
        """The stages whose artifacts a stage reads."""
        return tuple(dict.fromkeys(found.stage for found in references(self.configs[name])))

    def resolved(self, name: str) -> StageConfig:
        """A stage's config with the artifact folders of the stages before it."""
        artifacts = {
            other: output_path(config) / "artifact" for other, config in self.configs.items()
        }
        return substitute(self.configs[name], artifacts)

    def kind(self, name: str) -> str:
        """The kind of a stage: `sft`, `reward`, ..."""
        return str(self.configs[name].model_dump(include={"stage"})["stage"])


@dataclass(frozen=True)
class StageStatus:
    """One stage of a pipeline, or a run by itself."""

    name: str
    kind: str
    state: State
    output: str
    needs: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    """What changed, what is damaged, or why it failed."""
    size: int = 0
    """Bytes on disk, unfinished work included."""
    step: int | None = None
    """Last logged step of an unfinished run."""
    summary: Mapping[str, Any] = field(default_factory=dict)
    """Seconds, attempts and key metrics."""
    process: int | None = None
    """The process of this machine that is at work on it now."""

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


def survey(plan: Plan) -> list[StageStatus]:
    """How each stage of a pipeline stands. Reads inputs for their hashes; imports no torch."""
    told = (read_json(plan.output / PIPELINE_FILE) or {}).get("stages", {})
    found: dict[str, StageStatus] = {}
    for name in plan.configs:
        failure = told.get(name, {}).get("failure")
        found[name] = _stage_status(plan, name, found, failure)
    return list(found.values())


def _stage_status(
    plan: Plan, name: str, before: Mapping[str, StageStatus], failure: str | None
) -> StageStatus:
    output = output_path(plan.configs[name])
    partial = partial_path(output)
    state: State = "off"
    reasons: tuple[str, ...] = ()
    if name in plan.chosen:
        state, reasons = _compare(plan, name, output, before)
    if state in ("missing", "changed"):
        if failure:
            state, reasons = "failed", (failure,)
        elif partial.exists():
            state = "partial"
    asked = asked_of(plan.configs[name]) if state == "complete" else None
    if asked and kind_of(plan.configs[name]) != "push" and not is_pushed(output, asked.hub):
        reasons = (f"not pushed to {asked.hub.repo_id} yet",)
    home = partial if state in ("partial", "failed") and partial.exists() else output
    return StageStatus(
        name,
        plan.kind(name),
        state,
        str(output),
        plan.needs(name),
        reasons,
        size=folder_size(output) + folder_size(partial),
        step=_last_step(home) if home == partial else None,
        summary=read_json(home / "summary.json") or {},
        process=writer_of(output) if home == partial else None,
    )


def _compare(
    plan: Plan, name: str, output: Path, before: Mapping[str, StageStatus]
) -> tuple[State, tuple[str, ...]]:
    """State and reasons of a stage that is to run, by its inputs and what lies at its place."""
    names: dict[str, State] = {"absent": "missing", "unchanged": "complete", "changed": "changed"}
    names |= {"damaged": "damaged", "foreign": "foreign"}
    again = [other for other in plan.needs(name) if before[other].state != "complete"]
    identity: Identity | None = None
    trouble: tuple[str, ...] = ("runs after " + ", ".join(again),) if again else ()
    if not again:
        try:
            identity = identify(plan.resolved(name))
        except AlignError as error:
            trouble = tuple(str(problem) for problem in error.problems)
    found = standing(output, identity or Identity({}, {}))
    reasons = found.reasons if identity or found.state != "changed" else trouble
    return names[found.state], reasons


def _last_step(folder: Path) -> int | None:
    """The step on the last line of metrics.jsonl that has one."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            step = json.loads(line).get("step")
        except ValueError:
            continue
        if step is not None:
            return int(step)
    return None


def run_status(folder: Path) -> StageStatus:
    """How a run by itself stands.

    Raises:
        AlignError: the folder holds no run of align, finished or not.
    """
    output = folder.with_name(folder.name.removesuffix(".partial")).absolute()
    partial = partial_path(output)
    home = output if (output / "lineage.json").is_file() else partial
    lineage = read_json(home / "lineage.json")
    if not isinstance(lineage, dict):
        fail(
            "holds no run of align",
            where=str(folder),
            hint="name a run folder, a pipeline's folder or a recipe",
        )
    state: State = "partial"
    reasons: tuple[str, ...] = ()
    if home == output:
        found = standing(output, Identity({}, lineage.get("parts", {})))
        state = "complete" if found.state == "unchanged" else "damaged"
        reasons = found.reasons
    return StageStatus(
        str(lineage.get("name")),
        str(lineage.get("stage")),
        state,
        str(output),
        reasons=reasons,
        size=folder_size(output) + folder_size(partial),
        step=_last_step(home) if home == partial else None,
        summary=read_json(home / "summary.json") or {},
        process=writer_of(output) if home == partial else None,
    )


PARTIAL = re.compile(r"\.partial(-\w+)*$")
"""How the folder of an unfinished run ends; one that another recipe set aside has a mark."""


def runs_below(root: Path) -> list[StageStatus]:
    """Every run below a folder, whatever pipeline it is of, by path. Hidden folders are left out.

    The names are the folders' paths from `root`. Nothing is hashed: a run is complete where all
    its files have the sizes that it wrote down.
    """
    found = []
    for folder, below, files in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if "lineage.json" in files:
            below.clear()
            found.append(_run_at(Path(folder), root))
    return found


def _run_at(folder: Path, root: Path) -> StageStatus:
    lineage = read_json(folder / "lineage.json")
    state: State = "partial"
    reasons: tuple[str, ...] = ()
    if not isinstance(lineage, dict):
        lineage, state, reasons = {}, "damaged", ("lineage.json is no JSON",)
    elif not PARTIAL.search(folder.name):
        standing_there = standing(folder, Identity({}, lineage.get("parts", {})))
        state = "complete" if standing_there.state == "unchanged" else "damaged"
        reasons = standing_there.reasons
    elif not folder.name.endswith(".partial"):
        reasons = ("set aside for another recipe",)
    whole = folder.name.removesuffix(".partial") if folder.name.endswith(".partial") else None
    return StageStatus(
        folder.relative_to(root).as_posix(),
        str(lineage.get("stage", "?")),
        state,
        str(folder.absolute()),
        reasons=reasons,
        size=folder_size(folder),
        step=_last_step(folder) if state == "partial" else None,
        summary=read_json(folder / "summary.json") or {},
        process=writer_of(folder.with_name(whole)) if state == "partial" and whole else None,
    )
