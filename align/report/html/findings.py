"""What to know before trusting the scores: failures, alarms, falls, and what was looked at and is well."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from align.report.html.exam import Exam, dig
from align.report.html.gather import Run, Stage
from align.report.html.text import cut, interval, percent, points, signed, temperature

Level = Literal["bad", "warn", "note", "good"]

ENDED = 0.95
"""Share of answers that end their turn below which a reader is told."""
LONGER = 1.5
"""Growth of the mean length from which a reader is told."""
LONGEST = 240
"""Characters of a finding."""
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


def findings(run: Run, exam: Exam | None) -> list[Finding]:
    """Warnings and alarms, the gravest first; then what was looked at and is as it should be."""
    found = [*_of_stages(run)]
    if exam is not None and exam.final is not None:
        found += _of_exam(exam)
    order = ("bad", "warn", "note", "good")
    short = [found._replace(text=cut(found.text, LONGEST)) for found in found]
    return sorted(dict.fromkeys(short), key=lambda finding: order.index(finding.level))


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
    train = dig(stage.lineage, "data", "train") or {}
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
    error = dig(report, "calibration", "expected_error")
    if isinstance(error, float) and error > CALIBRATED:
        text = f"`{stage.name}` is off by {points(error)} where it says how sure it is"
        yield Finding("note", text, "reward-model")


def _of_exam(exam: Exam) -> Iterator[Finding]:
    final, base = exam.final, exam.baseline
    yield from _tasks(exam)
    yield from _endings(exam)
    yield from _higher(exam)
    for at in exam.temperatures:
        row, before = exam.row(final, at), exam.row(base, at)
        if row is None or before is None or row is before:
            continue
        tokens, was = dig(row, "tokens", "mean"), dig(before, "tokens", "mean")
        if tokens and was and tokens > LONGER * was:
            text = f"answers grew from {was:.0f} to {tokens:.0f} tokens ({temperature(at)})"
            yield Finding("warn", text, "lengths")
        safe, safe_was = (dig(side, "refusals", "safe") for side in (row, before))
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


def _higher(exam: Exam) -> Iterator[Finding]:
    """Another trained model that scores higher than the last one."""
    for at in exam.temperatures:
        last = exam.value(exam.final, at)
        others = [
            (value["mean"], label)
            for label in exam.labels
            if (value := exam.value(label, at)) and exam.made_by(label)
        ]
        if last and others and max(others)[0] > last["mean"] and max(others)[1] != exam.final:
            mean, label = max(others)
            text = f"`{label}` scores higher than `{exam.final}`: {mean:.3f} ({temperature(at)})"
            yield Finding("note", text, "tasks")


def _endings(exam: Exam) -> Iterator[Finding]:
    """The share of answers that end their turn."""
    rows = [(at, exam.row(exam.final, at)) for at in exam.temperatures]
    ended = [
        (at, share) for at, row in rows if (share := dig(row or {}, "ended", "mean")) is not None
    ]
    if ended:
        few = min(share for _, share in ended) < ENDED
        told = ", ".join(f"{percent(share)} {temperature(at)}" for at, share in ended)
        text = f"answers of `{exam.final}` that end their turn: {'only ' if few else ''}{told}"
        yield Finding("warn" if few else "good", text, "lengths")


def _hacked(exam: Exam, at: float) -> Iterator[Finding]:
    """Reward up, score down: the policy found what the reward model wrongly likes."""
    change = dig(exam.row(exam.final, at) or {}, "difference") or {}
    reward, score = dig(change, "reward"), dig(change, "scores", "score")
    if reward and score and reward["low"] > 0 and score["high"] < 0:
        text = f"the reward rose while the score fell ({temperature(at)}): reward hacking"
        yield Finding("bad", text, "frontier")


def _tasks(exam: Exam) -> Iterator[Finding]:
    """Tasks whose interval of the difference to the baseline lies below 0; else the lowest task."""
    lowest: tuple[float, str] | None = None
    count, clear = 0, False
    for at in exam.temperatures:
        tasks = dig(exam.row(exam.final, at) or {}, "difference", "tasks") or {}
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
