"""The charts of the evaluation, the samples and the reward model."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from align.report.html.answers import Sheet
from align.report.html.exam import Exam
from align.report.html.gather import Run, Stage
from align.report.html.metrics import thinned
from align.report.html.svg import (
    Frame,
    Scale,
    dot,
    image,
    label,
    line,
    path,
    tag,
    ticks,
    wide,
)
from align.report.html.text import cut, interval, number

BINS = 36
FAR = 4.0
"""Times the next largest KL from which a model is named and not drawn."""


def ridges(
    sheets: Sequence[Sheet], column: str, name: str, colours: Mapping[str, str]
) -> Markup | None:
    """Distributions above each other on one axis: a row per model, with a tick at its mean."""
    import numpy as np

    found = [(sheet.label, sheet.numbers(column)) for sheet in sheets]
    found = [(label_, values) for label_, values in found if values]
    if not found:
        return None
    every = np.concatenate([np.asarray(values) for _, values in found])
    low, high = wide([float(every.min()), float(every.max())])
    edges = np.linspace(low, high, BINS + 1)
    shares = [np.histogram(values, bins=edges)[0] / len(values) for _, values in found]
    most = max(float(share.max()) for share in shares)
    row, left, right, height = 46, 92, 328, 30
    x = Scale(low, high, left, right)
    bottom = 14 + row * len(found)
    parts = [_under(x, bottom, name)]
    for place, ((who, values), share) in enumerate(zip(found, shares, strict=True)):
        base = 10.0 + row * (place + 1)
        colour = colours.get(who, "s6")
        outline = [(x(low), base)]
        for at, part in enumerate(share):
            top = base - height * float(part) / most
            outline += [(x(float(edges[at])), top), (x(float(edges[at + 1])), top)]
        outline.append((x(high), base))
        mean = float(np.mean(values))
        parts += [
            path(outline, f"area {colour}", close=True),
            line(x(mean), base - height - 2, x(mean), base + 3, f"mean {colour}"),
            label(left - 8, base - 12, cut(who, 13), anchor="end", kind="who"),
            label(left - 8, base + 1, number(mean), anchor="end"),
        ]
    said = ", ".join(f"{who} mean {number(float(np.mean(values)))}" for who, values in found)
    return image(340, bottom + 36, f"{name}: {said}", *parts)


def _under(x: Scale, bottom: float, name: str) -> Markup:
    parts = [line(x.first, bottom, x.last, bottom, "axis")]
    for value in ticks(x.low, x.high):
        parts += [
            line(x(value), 10, x(value), bottom, "grid"),
            label(x(value), bottom + 15, number(value), anchor="middle"),
        ]
    parts.append(label(x.last, bottom + 30, name, anchor="end", kind="name"))
    return Markup("").join(parts)


def growth(stage: Stage) -> Markup | None:
    """Best and median score of N samples against N (Llama 2, figure 7)."""
    rows = stage.artifact("report.json").get("growth") or []
    if len(rows) < 2:
        return None
    lines = {key: [(math.log2(row["n"]), row[key]) for row in rows] for key in ("max", "median")}
    values = [value for points in lines.values() for _, value in points]
    frame = Frame.around([0.0, math.log2(rows[-1]["n"])], values, "samples per prompt (N)", "score")
    parts = []
    for row in rows:
        x = frame.x(math.log2(row["n"]))
        parts.append(label(x, frame.y.first + 16, str(row["n"]), anchor="middle"))
        parts.append(line(x, frame.y.first, x, frame.y.first + 4, "axis"))
    for place, (key, points) in enumerate(lines.items()):
        parts.append(path(map(frame.at, points), f"line s{place} d{place}"))
        for row, point in zip(rows, points, strict=True):
            said = f"{key} of {row['n']}: {number(row[key])}"
            parts.append(dot(*frame.at(point), f"mark s{place}", said, 3.5))
        word = "best" if key == "max" else key
        end = frame.at(points[-1])
        parts.append(label(end[0] - 4, end[1] - 8, word, anchor="end", kind=f"on s{place}"))
    bare = Frame(frame.x, frame.y, frame.x_name, frame.y_name, x_ticks=())
    shown = ", ".join(f"best of {row['n']} {number(row['max'])}" for row in rows)
    return bare.draw(f"{stage.name}: {shown}", *parts)


def histogram(stage: Stage) -> Markup | None:
    """Scores of all samples."""
    found = (stage.artifact("report.json").get("score") or {}).get("histogram") or {}
    counts, edges = found.get("counts") or [], found.get("edges") or []
    if not counts or len(edges) != len(counts) + 1:
        return None
    frame = Frame.around(edges, [0.0, *map(float, counts)], "score", "samples")
    parts = [
        tag(
            "rect",
            tag("title", f"{number(edges[at])} to {number(edges[at + 1])}: {count:,} samples"),
            x=frame.x(edges[at]) + 0.5,
            y=frame.y(count),
            width=max(frame.x(edges[at + 1]) - frame.x(edges[at]) - 1, 0.5),
            height=frame.y(0) - frame.y(count),
            class_="bar s0",
        )
        for at, count in enumerate(counts)
        if count
    ]
    mean = (stage.artifact("report.json")["score"]).get("mean")
    if isinstance(mean, float):
        parts.append(line(frame.x(mean), 20, frame.x(mean), frame.y.first, "mean s1"))
        parts.append(label(frame.x(mean) + 4, 20, f"mean {number(mean)}", kind="on s1"))
    return frame.draw(f"scores of the samples of {stage.name}, mean {number(mean)}", *parts)


def calibration(report: Mapping[str, Any]) -> Markup | None:
    """How sure the reward model says it is, against how often it is right."""
    bins = (report.get("calibration") or {}).get("bins") or []
    if not bins:
        return None
    low = min(0.5, *(one["accuracy"] for one in bins))
    low = math.floor(low * 10) / 10
    frame = Frame(
        Scale(0.5, 1.0, 50, 328),
        Scale(low, 1.0, 174, 24),
        "says it is right with probability",
        "is right",
    )
    parts = [path([frame.at((0.5, 0.5)), frame.at((1.0, 1.0))], "ideal")]
    for one in bins:
        bottom, top = _wilson(one["accuracy"], one["pairs"])
        x = frame.x(one["confidence"])
        said = (
            f"says {number(one['confidence'])}, is right in {number(one['accuracy'])} "
            f"of {one['pairs']} pairs"
        )
        parts.append(line(x, frame.y(max(bottom, low)), x, frame.y(top), "whisker s0"))
        parts.append(dot(x, frame.y(one["accuracy"]), "mark s0", said))
    error = (report.get("calibration") or {}).get("expected_error")
    return frame.draw(f"calibration, expected error {number(error)}", *parts)


def _wilson(share: float, n: int) -> tuple[float, float]:
    from align.evaluation.statistics import wilson_interval

    return wilson_interval(round(share * n), n) if n else (share, share)


def by_margin(report: Mapping[str, Any]) -> Markup | None:
    """Accuracy against how much better the chosen answer was said to be (Llama 2, table 8)."""
    buckets = [one for one in report.get("by_margin") or [] if one.get("value") is not None]
    if not buckets:
        return None
    low = math.floor(10 * min(0.5, *(one["low"] for one in buckets))) / 10
    xs = [(one["from"] + one["to"]) / 2 for one in buckets]
    frame = Frame(
        Scale(*wide([*(one["from"] for one in buckets), *(one["to"] for one in buckets)]), 50, 328),
        Scale(low, 1.0, 174, 24),
        "margin of the pair",
        "accuracy",
    )
    parts = [line(frame.x.first, frame.y(0.5), frame.x.last, frame.y(0.5), "ideal")]
    for one, middle in zip(buckets, xs, strict=True):
        x, y = frame.x(middle), frame.y(one["value"])
        said = f"margin {number(one['from'])} to {number(one['to'])}: {interval(one)}, {one['pairs']} pairs"
        parts += [
            line(frame.x(one["from"]), y, frame.x(one["to"]), y, "span s0"),
            line(x, frame.y(one["low"]), x, frame.y(one["high"]), "whisker s0"),
            dot(x, y, "mark s0", said),
        ]
    told = ", ".join(f"{number(one['value'])} at {number(one['from'])}" for one in buckets)
    return frame.draw(f"accuracy by margin: {told}", *parts)


# --- KL against reward -----------------------------------------------------------------------


def frontier(run: Run, exam: Exam, colours: Mapping[str, str]) -> tuple[Markup, list[str]] | None:
    """Mean reward against the distance from the reference, with notes on what is not drawn.

    Best-of-N needs no training and has at most KL log N - (N-1)/N, so it is the bar for the others.
    """
    rows = {label_: exam.row(label_, exam.temperatures[0]) for label_ in exam.labels}
    spots = {
        label_: (row["kl"]["k1"], row["reward"])
        for label_, row in rows.items()
        if row and row.get("kl") and row.get("reward")
    }
    if len(spots) < 2:
        return None
    notes = []
    ordered = sorted(spots, key=lambda name: spots[name][0]["mean"])
    far, near = ordered[-1], ordered[-2]
    if spots[far][0]["mean"] > FAR * max(spots[near][0]["mean"], 1.0) and len(spots) > 2:
        kl, reward = spots.pop(far)
        notes.append(f"`{far}` lies at {number(kl['mean'])} nats, reward {number(reward['mean'])}")
    best = _best_of(run, exam)
    trail = _trail(run, exam)
    xs = [kl[side] for kl, _ in spots.values() for side in ("mean", "high")]
    ys = [reward[side] for _, reward in spots.values() for side in ("low", "high")]
    xs += [x for x, _ in (*best, *trail)]
    ys += [y for _, y in (*best, *trail)]
    frame = Frame.around(
        [0.0, *xs], ys, "KL to the reference, nats per answer (root scale)", "reward", root=True
    )
    parts = []
    if len(trail) > 1:
        name = trail_stage(run, exam)
        model = next((m for m, source in exam.stage.models.items() if source == name), "")
        parts.append(path(map(frame.at, trail), f"trail {colours.get(model, 's6')}"))
        notes.append(f"thin line: `{name}` while it trained, on its training prompts")
    if len(best) > 1:
        parts.append(path(map(frame.at, best), "line s6 d1"))
        notes.append(
            "dashed: the best of N samples of the reference, on the prompts it was drawn for"
        )
    for name, (kl, reward) in spots.items():
        parts += _spot(frame, name, kl, reward, colours.get(name, "s6"))
    said = ", ".join(
        f"{name} reward {number(r['mean'])} at KL {number(k['mean'])}"
        for name, (k, r) in spots.items()
    )
    return frame.draw(f"reward against KL: {said}", *parts), notes


def _spot(frame: Frame, name: str, kl: Any, reward: Any, colour: str) -> list[Markup]:
    x, y = frame.at((kl["mean"], reward["mean"]))
    low, high = (frame.y(reward[side]) for side in ("low", "high"))
    left, right = (frame.x(kl[side]) for side in ("low", "high"))
    near_end = x > frame.x.last - 40
    said = f"{name}: reward {interval(reward)}, KL {interval(kl)}"
    place = (x - 8, "end") if near_end else (x + 8, "start")
    return [
        line(x, low, x, high, f"whisker {colour}"),
        line(left, y, right, y, f"whisker {colour}"),
        dot(x, y, f"mark {colour}", said),
        label(place[0], y - 6, name, anchor=place[1], kind=f"on {colour}"),
    ]


def _best_of(run: Run, exam: Exam) -> list[tuple[float, float]]:
    """KL bound and reward of the best of N of the reference's samples, scored by the same model."""
    reference = exam.stage.models.get(str(exam.results.get("reference")))
    judges = {stage.name for stage in run.of_kind("reward")} & {*exam.stage.needs}
    for stage in run.of_kind("sample"):
        if reference in stage.needs and judges & {*stage.needs}:
            rows = stage.artifact("report.json").get("growth") or []
            return [(math.log(r["n"]) - (r["n"] - 1) / r["n"], r["max"]) for r in rows]
    return []


def trail_stage(run: Run, exam: Exam) -> str | None:
    """The PPO stage whose way is drawn: the last one that starts from the reference."""
    reference = exam.stage.models.get(str(exam.results.get("reference")))
    found = [stage.name for stage in run.of_kind("ppo") if reference in stage.needs]
    return found[-1] if found else None


def _trail(run: Run, exam: Exam) -> list[tuple[float, float]]:
    stage = run.stage(trail_stage(run, exam) or "")
    if stage is None or not stage.setting("scorer.reward_model"):
        return []
    kl = dict(stage.metrics.series("objective/kl"))
    score = dict(stage.metrics.series("objective/scores"))
    points = [(max(kl[step], 0.0), score[step]) for step in kl if step in score]
    return thinned(points, 80) if points else []
