"""The evaluation that the verdict rests on, and which of its models is the last word."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.report.html.gather import Run, Stage

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Exam:
    """The evaluation that the verdict rests on."""

    stage: Stage
    results: Mapping[str, Any]
    part: str
    """`score`, or `reward` where no judge scored."""
    labels: tuple[str, ...]
    """Rows of the table in order: models, and best-of-K."""
    temperatures: tuple[float, ...]
    baseline: str | None
    final: str | None
    """Name of the model that the pipeline ends in."""

    def row(self, label: str | None, at: float) -> Row | None:
        """The row of a label at a temperature."""
        rows = self.results.get("rows", [])
        return next((r for r in rows if r["label"] == label and r["temperature"] == at), None)

    def value(self, label: str | None, at: float) -> Row | None:
        """Mean and interval of what is compared."""
        return self.of(self.row(label, at))

    def of(self, row: Row | None) -> Row | None:
        """Mean and interval of a row."""
        if row is None:
            return None
        found = row.get("reward") if self.part == "reward" else dig(row, "scores", "score")
        return found if isinstance(found, Mapping) else None

    def change(self, label: str | None, at: float) -> Row | None:
        """The paired difference to the baseline."""
        row = self.row(label, at)
        found = dig(row or {}, "difference")
        keys = ("reward",) if self.part == "reward" else ("scores", "score")
        change = dig(found or {}, *keys)
        return change if isinstance(change, Mapping) else None

    def made_by(self, label: str) -> str | None:
        """The stage that made a row's model."""
        row = next((r for r in self.results.get("rows", []) if r["label"] == label), None)
        return self.stage.models.get(str(row["model"])) if row else None


def dig(row: Any, *keys: str) -> Any:
    """What lies at the end of a way of keys; None where the way ends before."""
    for key in keys:
        row = row.get(key) if isinstance(row, Mapping) else None
    return row


def exams(run: Run) -> list[Exam]:
    """The evaluations that left results, in order."""
    found = []
    for stage in run.of_kind("eval"):
        results = stage.artifact("results.json")
        if stage.state != "partial" and results.get("rows"):
            found.append(_exam(run, stage, results))
    return found


def _exam(run: Run, stage: Stage, results: Mapping[str, Any]) -> Exam:
    rows = results["rows"]
    judged = any(dig(row, "scores", "score") for row in rows)
    return Exam(
        stage,
        results,
        "score" if judged else "reward",
        tuple(dict.fromkeys(str(row["label"]) for row in rows)),
        tuple(sorted({float(row["temperature"]) for row in rows}, reverse=True)),
        results.get("baseline"),
        _final(run, stage, [str(row["model"]) for row in rows]),
    )


def _final(run: Run, stage: Stage, names: Sequence[str]) -> str | None:
    """The model that was asked for; else the last one of the table, which is in the recipe's order."""
    asked = [name for name in names if run.target and stage.models.get(name) == run.target]
    return (asked or names)[-1] if names else None
