"""The plan in a terminal: a block of lines per stage, then the totals."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from align.plan.fleet import fewest_for_inference, fewest_for_training
from align.plan.memory import GIB, Memory
from align.plan.report import Plan
from align.plan.setting import StagePlan
from align.report.progress import short, size
from align.report.terminal import console, sanitise

Line = tuple[str, str, str]
"""Label, text, style."""

SMALL = 0.005
"""Share of the peak below which a component is not named."""


def show_plan(plan: Plan) -> None:
    """Print the plan (an answer: to stdout)."""
    screen = console(results=True)
    for stage in plan.stages:
        screen.print(Text(sanitise(_title(stage)), style="bold"))
        screen.print(_grid(_lines(plan, stage)))
    screen.print(Text("in all", style="bold"))
    screen.print(_grid(_totals(plan)))


def _grid(lines: Sequence[Line] | Iterator[Line]) -> Table:
    """Labels in a narrow column, texts that wrap beside them."""
    table = Table.grid(padding=(0, 1))
    table.add_column(width=12)
    table.add_column(overflow="fold")
    for label, text, style in lines:
        table.add_row(Text(f"  {label}", style=style or "dim"), Text(sanitise(text), style=style))
    return table


def _title(stage: StagePlan) -> str:
    name = stage.name if stage.name == stage.kind else f"{stage.name} ({stage.kind})"
    parts = [name, stage.model, stage.way]
    if stage.parameters:
        count = f"{short(stage.parameters)} parameters".replace("G ", "B ")
        if stage.trainable:
            share = stage.trainable / stage.parameters
            count += f", {short(stage.trainable).replace('G', 'B')} trained ({share:.1%})"
        parts.append(count)
    return " · ".join(part for part in parts if part)


def _lines(plan: Plan, stage: StagePlan) -> Iterator[Line]:
    if stage.gpus:
        yield "rows", _rows(stage), ""
    if stage.memory is not None:
        fits = stage.fits(plan.gpu)
        yield "memory", _memory(stage.memory, plan), "" if fits else "red"
        yield "batch", _batch(stage), ""
    if stage.gpus:
        yield "time", _time(stage), ""
    if stage.pushes:
        yield "pushes", ", ".join(stage.pushes), ""
    if stage.disk:
        yield "disk", ", ".join(f"{name} {size(value)}" for name, value in stage.disk.items()), ""
    if stage.downloads:
        names = [
            name + (f" ({size(value)})" if value else "") for name, value in stage.downloads.items()
        ]
        yield "downloads", ", ".join(names), ""
    for note in stage.notes:
        yield "note", note, ""
    for problem in plan.problems[stage.name]:
        where = f"{problem.where}: " if problem.where else ""
        yield "!", f"{where}{problem.message}", "yellow"
        if problem.hint:
            yield "", f"-> {problem.hint}", ""


def _rows(stage: StagePlan) -> str:
    count = f"{stage.rows:,}" if stage.rows is not None else "unknown"
    text = f"{count} ({stage.rows_source})" if stage.rows_source else count
    if stage.tokens is not None:
        bound = "at most " if stage.tokens_are_bound else "about "
        text += f", {bound}{short(stage.tokens)} tokens".replace("G ", "B ")
    if stage.steps is not None:
        text += f", {stage.steps:,} steps"
    return text


def _memory(memory: Memory, plan: Plan) -> str:
    """`21.3 of 77.6 GiB at the peak (backward): weights 15.0, ...`."""
    parts = [
        f"{name.replace('_', ' ')} {value / GIB:.2g}"
        if value < GIB
        else f"{name.replace('_', ' ')} {value / GIB:.1f}"
        for name, value in memory.parts.items()
        if value > SMALL * memory.total
    ]
    whole = (
        f"{memory.total / GIB:.1f} of {plan.gpu.usable / GIB:.1f} GiB at the peak ({memory.phase})"
    )
    return f"{whole}: {', '.join(parts)}"


def _batch(stage: StagePlan) -> str:
    batch = f"{stage.micro_batch:,} rows" if stage.micro_batch != 1 else "1 row"
    if stage.accumulation is not None:
        batch += f" x {stage.accumulation} accumulated"
    batch += f" x {stage.gpus} GPU{'s' if stage.gpus > 1 else ''}"
    most = stage.largest_micro_batch
    said = f"{most:,}" if most else "not even 1"
    return f"{batch} of up to {stage.length:,} tokens; {said} would fit"


def _time(stage: StagePlan) -> str:
    if stage.seconds_per_1k is None:
        return "unknown"
    per = f"{_duration(stage.seconds_per_1k)} per 1,000 rows"
    if stage.seconds is None:
        return per
    bound = "at most " if stage.tokens_are_bound else ""
    return f"{bound}about {_duration(stage.seconds)} ({per})"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            value = seconds / length
            return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def _totals(plan: Plan) -> Iterator[Line]:
    seconds = plan.seconds
    if seconds:
        bound = "at most " if any(stage.tokens_are_bound for stage in plan.stages) else ""
        yield "time", f"{bound}about {_duration(seconds)} on {plan.gpu.name}", ""
    yield "disk", f"{size(plan.disk)}, downloads of known size included", ""
    pushes = [name for stage in plan.stages for name in stage.pushes]
    yield "pushed", ", ".join(pushes) or "nothing: no stage of this recipe uploads", ""
    for shape in plan.shapes:
        training = fewest_for_training(shape, plan.gpu)
        inference = fewest_for_inference(shape, plan.gpu)
        name = short(shape.parameters).replace("G", "B")
        yield (
            f"{plan.gpu.name}s",
            (
                f"that hold {name}: trained {_counts(training)} (sharded, batch 1); served {_counts(inference)}"
            ),
            "",
        )


def _counts(found: dict[str, int | None]) -> str:
    return ", ".join(f"{way} {count or 'over 4096'}" for way, count in found.items())


def show_exact(counted: Sequence[dict[str, Any]]) -> None:
    """Print what fake steps counted beside what the formulas say, without overhead."""
    screen = console(results=True)
    screen.print(
        Text("one step on fake tensors (bytes that live; no context, no allocator)", style="bold")
    )
    screen.print(_grid(_exact_line(one) for one in counted))


def _exact_line(one: dict[str, Any]) -> Line:
    if "peak" not in one:
        return one["stage"], one["reason"], ""
    parts = ", ".join(f"{name} {value / GIB:.2f}" for name, value in one["parts"].items())
    error = one["formula"] / one["peak"] - 1
    text = (
        f"{one['peak'] / GIB:.2f} GiB at the peak ({one['where']}): {parts}; the formulas say "
        f"{one['formula'] / GIB:.2f} ({error:+.1%}); {one['seconds']:.0f} s"
    )
    return one["stage"], text, ""
