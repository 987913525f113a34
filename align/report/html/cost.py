"""What a run cost: time, tokens, samples, and the machine it ran on."""

from dataclasses import dataclass
from typing import Any

from align.report.html.gather import Run, Stage
from align.report.progress import size


@dataclass(frozen=True)
class Charge:
    """A stage's part."""

    stage: Stage
    seconds: float
    share: float
    """Of the time of all stages."""
    bar: float
    """Of the longest stage's time."""
    tokens: int | None
    rate: float | None
    """Tokens per second of the whole stage, loading included."""
    work: str
    """Steps, episodes, samples or prompts."""
    attempts: int


@dataclass(frozen=True)
class Cost:
    """All stages together."""

    charges: tuple[Charge, ...]
    seconds: float
    tokens: int
    machines: tuple[str, ...]
    versions: tuple[tuple[str, str], ...]


WORK = ("steps", "episodes", "completions", "prompts")


def cost(run: Run) -> Cost:
    """The cost of a run, over all attempts of every stage."""
    ran = [stage for stage in run.stages if isinstance(stage.summary.get("seconds"), int | float)]
    total = sum(float(stage.summary["seconds"]) for stage in ran)
    longest = max((float(stage.summary["seconds"]) for stage in ran), default=0.0)
    charges = tuple(_charge(stage, total, longest) for stage in ran)
    machines = dict.fromkeys(_machine(stage.environment) for stage in ran if stage.environment)
    versions = dict.fromkeys(
        (str(name), str(version))
        for stage in ran
        for name, version in (stage.environment.get("versions") or {}).items()
    )
    tokens = sum(charge.tokens or 0 for charge in charges)
    return Cost(charges, total, tokens, tuple(machines), tuple(versions))


def _charge(stage: Stage, total: float, longest: float) -> Charge:
    seconds = float(stage.summary["seconds"])
    tokens = stage.summary.get("tokens")
    tokens = int(tokens) if isinstance(tokens, int | float) else None
    work = [
        f"{stage.summary[key]:,} {key}" for key in WORK if isinstance(stage.summary.get(key), int)
    ]
    return Charge(
        stage,
        seconds,
        seconds / total if total else 0.0,
        seconds / longest if longest else 0.0,
        tokens,
        tokens / seconds if tokens and seconds else None,
        ", ".join(work[:2]),
        int(stage.summary.get("attempts") or 1),
    )


def _machine(environment: Any) -> str:
    accelerators = environment.get("accelerators") or []
    names = [
        str(one.get("name", one)) if isinstance(one, dict) else str(one) for one in accelerators
    ]
    counted = [f"{names.count(name)} × {name}" for name in dict.fromkeys(names)]
    memory = environment.get("memory_bytes")
    parts = [*counted, f"{environment.get('cpu') or 'CPU'}, {environment.get('cpu_cores')} cores"]
    parts += [size(memory)] if isinstance(memory, int | float) else []
    parts += [] if names else ["no GPU"]
    return ", ".join([*parts, str(environment.get("platform") or "")])
