"""Whether it worked: the scores of the models side by side, and what a reader has to know of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from align.report.html.gather import Run, Stage
from align.report.html.text import interval, percent, points, signed, temperature

Row = Mapping[str, Any]
Level = Literal["bad", "warn", "note", "good"]
Outcome = Literal["better", "worse", "mixed", "same", "unknown", "stopped"]

ENDED = 0.95
"""Share of answers that end their turn below which a reader is told."""
LONGER = 1.5
"""Growth of the mean length from which a reader is told."""
LOST_ROWS = 0.05
"""Share of rows dropped or cut from which a reader is told."""
CALIBRATED = 0.1
"""Expected calibration error from which a reader is told."""


class Finding(NamedTuple):
    """Something to know before trusting the scores."""

    level: Level
    text: str
    anchor: str
    """Where the page shows more."""


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
        found = row.get("reward") if self.part == "reward" else _at(row, "scores", "score")
        return found if isinstance(found, Mapping) else None

    def change(self, label: str | None, at: float) -> Row | None:
        """The paired difference to the baseline."""
        row = self.row(label, at)
        found = _at(row or {}, "difference")
        keys = ("reward",) if self.part == "reward" else ("scores", "score")
        change = _at(found or {}, *keys)
        return change if isinstance(change, Mapping) else None

    def made_by(self, label: str) -> str | None:
        """The stage that made a row's model."""
        row = next((r for r in self.results.get("rows", []) if r["label"] == label), None)
        return self.stage.models.get(str(row["model"])) if row else None


def _at(row: Any, *keys: str) -> Any:
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
    judged = any(_at(row, "scores", "score") for row in rows)
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
    """The model that the last training stage made (or the one that was asked for); else the last row's."""
    made = {source: name for name, source in stage.models.items() if name in names}
    if run.target in made:
        return made[run.target]
    trained = [s.name for s in run.stages if s.kind in ("sft", "dpo", "ppo") and s.name in made]
    return made[trained[-1]] if trained else (names[-1] if names else None)


# --- the sentence ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """The first thing on the page."""

    outcome: Outcome
    head: str
    detail: str


def verdict(run: Run, exam: Exam | None) -> Verdict:
    """One sentence on whether it worked, and one on how that is known."""
    stopped = next((stage for stage in run.stages if stage.state == "failed"), None)
    stopped = stopped or next((stage for stage in run.stages if stage.state == "partial"), None)
    if stopped is not None:
        return _stopped(run, stopped)
    if exam is None:
        return _unmeasured(run)
    final, base = exam.final, exam.baseline
    changes = [(at, change) for at in exam.temperatures if (change := exam.change(final, at))]
    if base is None or final == base or not changes:
        return _alone(exam)
    outcome = _outcome([change for _, change in changes])
    words = {
        "better": "It worked: `{final}` beats `{base}`",
        "worse": "It did not work: `{final}` is worse than `{base}`",
        "mixed": "Mixed: `{final}` beats `{base}` in some settings and loses in others",
        "same": "No clear difference between `{final}` and `{base}`",
    }
    at = changes[0][0]
    before, after = exam.value(base, at), exam.value(final, at)
    head = words[outcome].format(final=final, base=base)
    if before and after and outcome != "mixed":
        head += f", {before['mean']:.3f} → {after['mean']:.3f} {temperature(at)}"
    n, level = exam.results.get("prompts"), exam.results.get("confidence", 0.95)
    told = "; ".join(
        f"{signed(c['mean'])} {temperature(at)} [{signed(c['low'])}, {signed(c['high'])}], {_p(c)}"
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
    wins = sum(change["low"] > 0 for change in changes)
    losses = sum(change["high"] < 0 for change in changes)
    if wins and losses:
        return "mixed"
    return "better" if wins else "worse" if losses else "same"


def _p(change: Row) -> str:
    return "p < .001" if change["p"] < 0.001 else f"p = {change['p']:.3f}".replace("0.", ".")


def _stopped(run: Run, stage: Stage) -> Verdict:
    done = [s.name for s in run.stages if s.state in ("complete", "changed")]
    word = "failed" if stage.state == "failed" else "is unfinished"
    reason = stage.reasons[0] if stage.reasons else "no reason was recorded"
    stays = f" Complete: {', '.join(done)}." if done else ""
    return Verdict("stopped", f"Not finished: `{stage.name}` {word}", f"{reason}.{stays}")


def _unmeasured(run: Run) -> Verdict:
    missing = [s.name for s in run.stages if s.state == "missing"]
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


# --- what to know ----------------------------------------------------------------------------


def findings(run: Run, exam: Exam | None) -> list[Finding]:
    """Warnings and alarms, the gravest first; then what was looked at and is as it should be."""
    found = [*_of_stages(run)]
    if exam is not None and exam.final is not None:
        found += _of_exam(exam)
    order = ("bad", "warn", "note", "good")
    return sorted(dict.fromkeys(found), key=lambda finding: order.index(finding.level))


def _of_stages(run: Run) -> Iterator[Finding]:
    for stage in run.stages:
        anchor = f"stage-{stage.name}"
        for reason in stage.reasons:
            if stage.state in ("failed", "damaged"):
                yield Finding("bad", f"`{stage.name}` {stage.state}: {reason}", anchor)
            elif stage.state in ("changed", "partial"):
                word = "is unfinished" if stage.state == "partial" else "is out of date"
                yield Finding("warn", f"`{stage.name}` {word}: {reason}", anchor)
        for key, step in stage.metrics.broken.items():
            text = f"`{stage.name}`: {key} is no finite number from step {step} on"
            yield Finding("bad" if key in ("loss", "grad_norm") else "warn", text, anchor)
        for alarm in stage.metrics.alarms:
            text = f"`{stage.name}` alarm `{alarm.get('alarm')}`: {alarm.get('reason')}"
            yield Finding("warn", text, anchor)
        for warning in stage.artifact("report.json").get("warnings", []):
            yield Finding("warn", f"`{stage.name}`: {warning}", anchor)
        yield from _of_rows(stage, anchor)
        if stage.kind == "reward":
            yield from _of_reward(stage, anchor)


def _of_rows(stage: Stage, anchor: str) -> Iterator[Finding]:
    train = _at(stage.lineage, "data", "train") or {}
    words = {"too_long": "dropped as too long", "truncated": "cut", "no_loss": "without any loss"}
    for key, word in words.items():
        count, rows = train.get(key) or 0, train.get("rows") or 0
        if rows and count / rows > LOST_ROWS:
            text = f"`{stage.name}`: {count} of {rows} training rows were {word}"
            yield Finding("warn", text, anchor)


def _of_reward(stage: Stage, anchor: str) -> Iterator[Finding]:
    report = stage.artifact("reward_report.json")
    accuracy = report.get("accuracy") or {}
    if (accuracy.get("low") or 1.0) <= 0.5:
        text = f"`{stage.name}` is not clearly better than a coin: accuracy {interval(accuracy)}"
        yield Finding("bad", text, "reward-model")
    elif accuracy.get("value") is not None:
        text = f"`{stage.name}` orders {percent(accuracy['value'])} of {accuracy['pairs']} pairs rightly"
        yield Finding("good", text, "reward-model")
    if "held-out" not in str(report.get("pairs_from", "held-out")):
        text = f"`{stage.name}`: accuracy was measured on the pairs it was trained on"
        yield Finding("warn", text, "reward-model")
    error = _at(report, "calibration", "expected_error")
    if isinstance(error, float) and error > CALIBRATED:
        text = f"`{stage.name}` is off by {points(error)} where it says how sure it is"
        yield Finding("note", text, "reward-model")


def _of_exam(exam: Exam) -> Iterator[Finding]:
    final, base = exam.final, exam.baseline
    yield from _tasks(exam)
    yield from _endings(exam)
    for at in exam.temperatures:
        row, before = exam.row(final, at), exam.row(base, at)
        if row is None or before is None or row is before:
            continue
        tokens, was = _at(row, "tokens", "mean"), _at(before, "tokens", "mean")
        if tokens and was and tokens > LONGER * was:
            text = f"answers grew from {was:.0f} to {tokens:.0f} tokens ({temperature(at)})"
            yield Finding("warn", text, "lengths")
        safe, safe_was = (_at(side, "refusals", "safe") for side in (row, before))
        if safe and safe_was and safe["low"] > safe_was["high"]:
            text = (
                f"`{final}` refuses {percent(safe['mean'])} of safe prompts, `{base}` "
                f"{percent(safe_was['mean'])} ({temperature(at)})"
            )
            yield Finding("warn", text, "tasks")
        yield from _hacked(exam, at)
    if exam.part == "reward":
        text = "no judge scored the answers: a higher reward alone does not show better answers"
        yield Finding("warn", text, "frontier")


def _endings(exam: Exam) -> Iterator[Finding]:
    """The share of answers that end their turn."""
    rows = [(at, exam.row(exam.final, at)) for at in exam.temperatures]
    ended = [
        (at, share) for at, row in rows if (share := _at(row or {}, "ended", "mean")) is not None
    ]
    if ended:
        few = min(share for _, share in ended) < ENDED
        told = ", ".join(f"{percent(share)} {temperature(at)}" for at, share in ended)
        text = f"answers of `{exam.final}` that end their turn: {'only ' if few else ''}{told}"
        yield Finding("warn" if few else "good", text, "lengths")


def _hacked(exam: Exam, at: float) -> Iterator[Finding]:
    """Reward up, score down: the policy found what the reward model wrongly likes."""
    change = _at(exam.row(exam.final, at) or {}, "difference") or {}
    reward, score = _at(change, "reward"), _at(change, "scores", "score")
    if reward and score and reward["low"] > 0 and score["high"] < 0:
        text = f"the reward rose while the score fell ({temperature(at)}): reward hacking"
        yield Finding("bad", text, "frontier")


def _tasks(exam: Exam) -> Iterator[Finding]:
    """Tasks whose interval of the difference to the baseline lies below 0; else the lowest task."""
    lowest: tuple[float, str] | None = None
    count, clear = 0, False
    for at in exam.temperatures:
        tasks = _at(exam.row(exam.final, at) or {}, "difference", "tasks") or {}
        changes = {task: parts["score"] for task, parts in tasks.items() if parts.get("score")}
        fell = [f"{task} {signed(c['mean'])}" for task, c in changes.items() if c["high"] < 0]
        if fell:
            clear = True
            text = (
                f"{len(fell)} of {len(tasks)} tasks fell against `{exam.baseline}` "
                f"({temperature(at)}): {', '.join(fell)}"
            )
            yield Finding("warn", text, "tasks")
        for task, c in changes.items():
            count = len(changes)
            bounds = f"[{signed(c['low'], 2)}, {signed(c['high'], 2)}]"
            told = f"{task} {signed(c['mean'], 2)} {bounds} ({temperature(at)})"
            lowest = min(lowest or (0.0, ""), (c["mean"], told))
    if count and not clear:
        text = f"none of {count} tasks clearly fell against `{exam.baseline}`"
        text += f"; the lowest is {lowest[1]}" if lowest and lowest[1] else ""
        yield Finding("good", text, "tasks")
