"""Whether it worked, in one sentence, and how that is known in another."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from align.report.html.exam import Exam, Row
from align.report.html.gather import Run, Stage
from align.report.html.text import interval, p_value, percent, signed, temperature
from align.stages import OUTSIDE

Outcome = Literal["better", "worse", "mixed", "same", "unknown", "stopped"]


@dataclass(frozen=True)
class Verdict:
    """The first thing on the page."""

    outcome: Outcome
    head: str
    detail: str


def verdict(run: Run, exam: Exam | None) -> Verdict:
    """One sentence on whether it worked, and one on how that is known."""
    held = [stage for stage in run.stages if stage.kind not in OUTSIDE]  # no stage waits for a push
    stopped = next((stage for stage in held if stage.state == "failed"), None)
    stopped = stopped or next((stage for stage in held if stage.state == "partial"), None)
    if stopped is not None:
        return _stopped(run, stopped)
    if exam is None:
        return _unmeasured(run)
    final, base = exam.final, exam.baseline
    changes = [(at, change) for at in exam.temperatures if (change := exam.change(final, at))]
    if base is None or final == base or not changes:
        return _alone(exam)
    outcome = _outcome([change for _, change in changes])
    head = _head(outcome, str(final), base, changes)
    at = changes[0][0]
    before, after = exam.value(base, at), exam.value(final, at)
    if before and after and outcome != "mixed":
        head += f", {before['mean']:.3f} → {after['mean']:.3f} {temperature(at)}"
    n, level = exam.results.get("prompts"), exam.results.get("confidence", 0.95)
    told = "; ".join(
        f"{signed(c['mean'])} {temperature(at)} [{signed(c['low'])}, {signed(c['high'])}], {p_value(c)}"
        for at, c in changes
    )
    what = f"scored by `{exam.results['judge']}`" if exam.part == "score" else "mean reward"
    return Verdict(
        outcome,
        head,
        f"{n} held-out prompts, {what}. Paired difference on the same prompts, "
        f"{percent(level)} interval: {told}.",
    )


def _alone(exam: Exam) -> Verdict:
    """A model that is compared with nothing."""
    values = [(at, value) for at in exam.temperatures if (value := exam.value(exam.final, at))]
    told = ", ".join(f"{interval(value)} {temperature(at)}" for at, value in values)
    why = (
        "the others are compared with it"
        if exam.baseline == exam.final
        else "the evaluation names no baseline to compare it with"
    )
    n = exam.results.get("prompts")
    return Verdict(
        "unknown", f"`{exam.final}`: {exam.part} {told}", f"{n} held-out prompts; {why}."
    )


def _outcome(changes: Sequence[Row]) -> Literal["better", "worse", "mixed", "same"]:
    """Better or worse in every setting, in none, or in some only."""
    wins = sum(change["low"] > 0 for change in changes)
    losses = sum(change["high"] < 0 for change in changes)
    if not wins and not losses:
        return "same"
    if len(changes) in (wins, losses):
        return "better" if wins else "worse"
    return "mixed"


def _head(outcome: Outcome, final: str, base: str, changes: Sequence[tuple[float, Row]]) -> str:
    if outcome == "better":
        return f"It worked: `{final}` beats `{base}`"
    if outcome == "worse":
        return f"It did not work: `{final}` is worse than `{base}`"
    if outcome == "same":
        return f"No clear difference between `{final}` and `{base}`"
    words = [
        f"{'better' if c['low'] > 0 else 'worse' if c['high'] < 0 else 'no clear difference'} {temperature(at)}"
        for at, c in changes
    ]
    return f"Mixed: `{final}` against `{base}` is {', '.join(words)}"


def _stopped(run: Run, stage: Stage) -> Verdict:
    done = [s.name for s in run.stages if s.state in ("complete", "changed")]
    step = max(stage.metrics.steps, default=None)
    word = "failed" if stage.state == "failed" else "has begun"
    if step is not None:
        word = f"{'failed' if stage.state == 'failed' else 'stands'} at step {step}"
    reason = stage.reasons[0] if stage.reasons else "no reason was recorded"
    stays = f" Complete: {', '.join(done)}." if done else ""
    return Verdict("stopped", f"Not finished: `{stage.name}` {word}", f"{reason}.{stays}")


def _unmeasured(run: Run) -> Verdict:
    missing = [s.name for s in run.stages if s.state == "missing" and s.kind not in OUTSIDE]
    complete = [s.name for s in run.stages if s.state in ("complete", "changed")]
    if missing:
        head = f"Part of the way: {len(complete)} of {len(complete) + len(missing)} stages have run"
        return Verdict("stopped", head, f"Still to run: {', '.join(missing)}.")
    told = _of_target(run)
    if told is not None:
        return told
    evaluated = any(stage.kind == "eval" for stage in run.stages)
    why = (
        "the evaluation left no results"
        if evaluated
        else "no evaluation is part of it: `align eval` makes one"
    )
    name = run.target or run.title
    return Verdict(
        "unknown", f"`{name}` is complete; whether it got better is not known", f"{why}."
    )


def _of_target(run: Run) -> Verdict | None:
    """What a run that leaves no policy says of itself."""
    stage = run.stage(run.target or "")
    report = stage.artifact("reward_report.json") if stage else {}
    accuracy = report.get("accuracy") or {}
    if stage and accuracy.get("value") is not None:
        head = f"`{stage.name}` orders {percent(accuracy['value'])} of the pairs rightly"
        outcome: Outcome = "better" if (accuracy.get("low") or 0.0) > 0.5 else "worse"
        what = f"{accuracy.get('pairs')} pairs, {report.get('pairs_from')}"
        return Verdict(outcome, head, f"Accuracy {interval(accuracy)}; {what}. A coin has 0.5.")
    growth = stage.artifact("report.json").get("growth") if stage else None
    if stage and growth:
        last = growth[-1]
        head = (
            f"`{stage.name}`: best of {last['n']} scores {last['max']:.3f}, one {last['mean']:.3f}"
        )
        count = stage.artifact("report.json").get("completions")
        return Verdict("unknown", head, f"{count:,} samples; whether they teach well shows later.")
    return None
