"""What a run folder knows of itself and of the runs before it. Reads files only; no model library.

Paths of this machine are read here and go no further: what comes out are names, hashes and counts.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from align.data.cards import CARD, Card, read_card
from align.data.exact import turn_text
from align.durable import read_json
from align.errors import fail
from align.lineage import file_sha256
from align.resources import find_path, shipped
from align.standing import looks_local

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True)
class DataFacts:
    """One source of a stage's rows."""

    name: str
    split: str | None
    rows: int | None
    sha256: str | None
    license: str | None = None
    """As its data card says; None where it has none."""
    source: str | None = None
    hub: str | None = None
    made_by: str | None = None
    """The stage that wrote these rows."""


@dataclass(frozen=True)
class StageFacts:
    """One stage of the way to a model."""

    name: str
    kind: str
    fingerprint: str
    artifact: str | None
    """sha256 over the names and contents of what it left."""
    seconds: float
    recipe: Mapping[str, Any]
    data: tuple[DataFacts, ...]
    kept: int | None
    """Rows that were used."""
    base: str | None
    """Hub id or folder name of the model it starts from, where no stage of ours made that."""


@dataclass(frozen=True)
class Measured:
    """A mean with its interval."""

    metric: str
    value: float
    low: float | None
    high: float | None
    n: int | None
    data: DataFacts | None
    judge: str | None = None
    temperature: float | None = None
    confidence: float = 0.95


@dataclass(frozen=True)
class RunFacts:
    """A complete run: itself, the stages before it, what was measured, what it answers."""

    folder: Path
    stages: tuple[StageFacts, ...]
    """In order; the last one is the run itself."""
    environment: Mapping[str, Any]
    summary: Mapping[str, Any]
    model_config: Mapping[str, Any]
    """config.json of the base (of the model itself, where it is a full one)."""
    base: str | None
    """Base of an adapter as its config names it: a Hub id or a path."""
    base_revision: str | None
    measured: tuple[Measured, ...] = ()
    samples: tuple[tuple[str, str], ...] = ()
    """Prompt and greedy answer."""
    roots: tuple[str, ...] = field(default=())
    """Models on which the first stages stand, as the recipes name them."""

    @property
    def artifact(self) -> Path:
        """The model's folder."""
        return self.folder / "artifact"

    @property
    def scores(self) -> bool:
        """Whether it is a reward model: an average may be one too."""
        own = read_json(self.artifact / "adapter_config.json") or {}
        names = (read_json(self.artifact / "config.json") or {}).get("architectures") or ()
        heads = any(str(name).endswith("ForSequenceClassification") for name in names)
        return heads or own.get("task_type") == "SEQ_CLS"

    @property
    def stage(self) -> StageFacts:
        """The run itself."""
        return self.stages[-1]


def read_run(folder: Path, *, samples: int = 3) -> RunFacts:
    """Read a complete run and what it stands on.

    Raises:
        AlignError: no run, an unfinished one, or one whose files are not those it wrote.
    """
    folder = folder.expanduser().absolute()
    lineage = read_json(folder / "lineage.json")
    if not isinstance(lineage, dict) or "outputs" not in lineage:
        unfinished = folder.with_name(f"{folder.name}.partial").is_dir()
        fail(
            "is an unfinished run" if unfinished else "is no complete run of align",
            where=str(folder),
            hint="name a run folder (with recipe.yaml, lineage.json and artifact/)",
        )
    _check_files(folder, lineage)
    stages: dict[str, StageFacts] = {}
    for place in _way(folder, {}):
        found = _stage(place)
        stages[found.fingerprint] = found
    adapter = read_json(folder / "artifact" / "adapter_config.json") or {}
    base = adapter.get("base_model_name_or_path")
    measured, answers = _evaluations(folder, samples)
    return RunFacts(
        folder,
        tuple(stages.values()),
        read_json(folder / "environment.json") or {},
        read_json(folder / "summary.json") or {},
        _model_config(folder, base),
        base,
        adapter.get("revision"),
        (*_of_summary(folder, stages[lineage["fingerprint"]]), *measured),
        answers,
        tuple(dict.fromkeys(item.base for item in stages.values() if item.base)),
    )


def _check_files(folder: Path, lineage: Mapping[str, Any]) -> None:
    for name, facts in lineage["outputs"]["files"].items():
        file = folder / "artifact" / name
        if not file.is_file() or file_sha256(file) != facts["sha256"]:
            fail(
                f"artifact/{name} is missing or is not what the stage wrote",
                where=str(folder),
                hint="the run is damaged: restore the file, or run the stage again",
            )


def _model_config(folder: Path, base: str | None) -> dict[str, Any]:
    places = [folder / "artifact"] + ([found] if base and (found := find_path(base)) else [])
    return next((kept for place in places if (kept := read_json(place / "config.json"))), {})


# --- the way here ---------------------------------------------------------------------------


def _run_of(path: str) -> Path | None:
    """The run folder that a file or folder belongs to."""
    given = Path(path)
    return next((up for up in (given, *given.parents[:3]) if (up / "lineage.json").is_file()), None)


def _still_there(place: Path, facts: Mapping[str, Any]) -> bool:
    """Whether an earlier run still holds what a later one read."""
    outputs = (read_json(place / "lineage.json") or {}).get("outputs") or {}
    known = {outputs.get("artifact")} | {
        file["sha256"] for file in outputs.get("files", {}).values()
    }
    return facts.get("sha256") in known


def _parents(lineage: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Path]]:
    for facts in lineage.get("inputs", []):
        place = _run_of(facts["path"]) if "sha256" in facts else None
        if place is not None and _still_there(place, facts):
            yield facts, place


def _way(folder: Path, seen: dict[Path, None]) -> Iterator[Path]:
    """The runs that a run stands on, earliest first, then itself."""
    if folder in seen:
        return
    seen[folder] = None
    for _, place in _parents(read_json(folder / "lineage.json") or {}):
        yield from _way(place, seen)
    yield folder


def _stage(folder: Path) -> StageFacts:
    lineage = read_json(folder / "lineage.json")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    made = {
        facts["key"]: read_json(place / "lineage.json")["name"]
        for facts, place in _parents(lineage)
    }
    data = tuple(
        _data(facts, made.get(facts["key"]))
        for facts in lineage.get("inputs", [])
        if "data" in facts["kind"].split()
    )
    return StageFacts(
        lineage["name"],
        lineage["stage"],
        lineage["fingerprint"],
        (lineage.get("outputs") or {}).get("artifact"),
        float((read_json(folder / "summary.json") or {}).get("seconds", 0)),
        recipe,
        data,
        lineage.get("data", {}).get("train", {}).get("kept"),
        _start(recipe, made),
    )


def _start(recipe: Mapping[str, Any], made: Mapping[str, str]) -> str | None:
    """The model that a stage starts from where no stage of ours made it; of an average the first."""
    if recipe.get("stage") != "average":
        given = {"model.model_name_or_path": (recipe.get("model") or {}).get("model_name_or_path")}
    else:
        given = {f"models.{name}": path for name, path in recipe["models"].items()}
    key, path = next(iter(given.items()))
    return None if path is None or key in made else str(path)


# --- data -----------------------------------------------------------------------------------


def _data(facts: Mapping[str, Any], made_by: str | None) -> DataFacts:
    path = facts["path"]
    kept = facts.get("split"), facts.get("rows"), facts.get("sha256")
    if made_by is not None:
        return DataFacts(f"{made_by}/{Path(path).name}", *kept, made_by=made_by)
    card = _card_of(path, is_hub="sha256" not in facts)
    if card is not None:
        hub = card.hub if card.hub and HUB_ID.fullmatch(card.hub) else None
        return DataFacts(card.name, *kept, card.license, " ".join(card.source.split()), hub)
    if "sha256" not in facts:
        return DataFacts(path, *kept, hub=path if HUB_ID.fullmatch(path) else None)
    return DataFacts(Path(path).name, *kept)


def _card_of(path: str, *, is_hub: bool) -> Card | None:
    """The card beside a file, or the shipped one of a Hub data set."""
    if not is_hub:
        file = find_path(path)
        beside = file.parent / CARD if file else None
        return read_card(beside) if beside and beside.is_file() else None
    cards = (read_card(file) for file in sorted(shipped("datasets").glob(f"*/{CARD}")))
    return next((card for card in cards if card.hub == path), None)


# --- what was measured ----------------------------------------------------------------------


def _of_summary(folder: Path, stage: StageFacts) -> Iterator[Measured]:
    """A reward model's own accuracy on held-out pairs."""
    report = read_json(folder / "artifact" / "reward_report.json") or {}
    found = report.get("accuracy")
    if stage.kind == "reward" and isinstance(found, dict) and found.get("value") is not None:
        data = stage.data[0] if stage.data else None
        bounds = found.get("low"), found.get("high"), found.get("pairs")
        metric = f"accuracy on pairs ({report.get('pairs_from')})"
        yield Measured(metric, float(found["value"]), *bounds, data)


def _evaluations(
    run: Path, samples: int
) -> tuple[tuple[Measured, ...], tuple[tuple[str, str], ...]]:
    """What the evaluations beside a run say of this very model, and some of its answers."""
    measured: list[Measured] = []
    answers: list[tuple[str, str]] = []
    for place, kept, label in evaluations_of(run):
        measured += _results(place, label, kept)
        answers += _answers(place, label, samples)
    return tuple(measured), tuple(answers[:samples])


def evaluations_of(run: Path) -> Iterator[tuple[Path, Mapping[str, Any], str]]:
    """Folder, lineage and this model's label of the evaluations beside a run that had this very model."""
    run = run.parent if run.name == "artifact" else run
    mine = ((read_json(run / "lineage.json") or {}).get("outputs") or {}).get("artifact")
    for file in sorted(run.parent.glob("*/lineage.json")) if mine else ():
        kept = read_json(file)
        if not isinstance(kept, dict) or kept.get("stage") != "eval" or "outputs" not in kept:
            continue
        same = [
            facts["key"].removeprefix("models.")
            for facts in kept["inputs"]
            if facts["key"].startswith("models.") and facts.get("sha256") == mine
        ]
        if same:
            yield file.parent, kept, same[0]


def _results(folder: Path, label: str, lineage: Mapping[str, Any]) -> Iterator[Measured]:
    results = read_json(folder / "artifact" / "results.json") or {}
    inputs = [facts for facts in lineage["inputs"] if "data" in facts["kind"].split()]
    data = _data(inputs[0], None) if inputs else None
    for row in results.get("rows", []):
        if row.get("model") != label or row.get("best_of") is not None:
            continue
        for metric, found in (row.get("scores") or {}).items():
            yield Measured(
                metric,
                float(found["mean"]),
                found.get("low"),
                found.get("high"),
                found.get("n"),
                data,
                results.get("judge"),
                row.get("temperature"),
                float(results.get("confidence", 0.95)),
            )


def _answers(folder: Path, label: str, samples: int) -> Iterator[tuple[str, str]]:
    """Answers at the lowest temperature, spread over the prompts."""
    file = folder / "artifact" / "answers.parquet"
    if samples == 0 or not file.is_file():
        return
    import pyarrow.parquet as parquet

    columns = ["model", "temperature", "best_of", "prompt", "answer"]
    rows = [
        row
        for row in parquet.read_table(file, columns=columns).to_pylist()
        if row["model"] == label and row["best_of"] is None
    ]
    coldest = min((row["temperature"] for row in rows), default=0)
    rows = [row for row in rows if row["temperature"] == coldest]
    for row in rows[:: max(len(rows) // samples, 1)][:samples]:
        yield _prompt_text(row["prompt"]), row["answer"]


def _prompt_text(prompt: str) -> str:
    try:
        turns = json.loads(prompt)
    except ValueError:
        return prompt
    if not isinstance(turns, list):
        return prompt
    return "\n".join(f"{turn.get('role')}: {turn_text(turn)}" for turn in turns)


def is_local(name: str) -> bool:
    """Whether a model's name means a folder of this machine, there or gone."""
    return find_path(name) is not None or looks_local(name)
