"""The lineage of a run as a drawing: stages in columns, an arrow from each to what was built on it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from align.report.html.gather import Run, Stage
from align.report.html.svg import label, tag
from align.report.html.text import cut, number
from align.report.progress import duration

WIDTH, HEIGHT, ACROSS, DOWN, THIN = 148, 62, 46, 16, 10
"""Size of a node, the gaps between nodes, and the height of a place that an arrow passes through."""
SWEEPS = 4
"""Times that the columns are put in order, forth and back."""

MARKS = {
    "complete": "✓",
    "changed": "↻",
    "partial": "…",
    "failed": "✕",
    "damaged": "✕",
    "missing": "○",
    "off": "–",
}
"""State of a stage -> its sign; colour never says it alone."""

Slot = tuple[str, int]
"""A node (name, its column) or a place in a column that an arrow to `name` passes through."""


@dataclass(frozen=True)
class _Edge:
    source: str
    target: str


def lineage(run: Run, facts: Mapping[str, Sequence[str]]) -> Markup | None:
    """The drawing; each node leads to its stage's section.

    Args:
        run: the run.
        facts: stage -> two lines below its name.
    """
    stages = {stage.name: stage for stage in run.stages if stage.state != "off"}
    if not stages:
        return None
    edges = _edges(stages)
    column = _columns(stages, edges)
    slots, links = _slots(stages, edges, column)
    _sort(slots, links)
    spots = _places(slots, column)
    wide = max(x for x, _, _ in spots.values()) + WIDTH + 2
    high = max(y + height for _, y, height in spots.values()) + 2
    arrows = [_arrow(edge, column, spots) for edge in edges]
    nodes = [
        _node(stage, spots[name, column[name]], facts.get(name, ()))
        for name, stage in stages.items()
    ]
    return tag(
        "svg",
        _head(),
        *arrows,
        *nodes,
        viewBox=f"0 0 {wide:g} {high:g}",
        width=f"{wide:g}",
        height=f"{high:g}",
        class_="lineage",
        role="img",
        aria_label="; ".join(f"{edge.source} leads to {edge.target}" for edge in edges),
    )


def _edges(stages: Mapping[str, Stage]) -> list[_Edge]:
    """Who was built on whom. An evaluation reads all it compares: only its nearest are drawn."""
    needs = {
        name: [need for need in stage.needs if need in stages] for name, stage in stages.items()
    }

    above: dict[str, set[str]] = {}
    for name in stages:  # in order, each once: rounds have more ways back than can be walked
        above[name] = {name}.union(*(above.get(need, {need}) for need in needs[name]))
    found = []
    for name, stage in stages.items():
        implied: set[str] = set()
        if stage.kind == "eval":
            implied = implied.union(*(above[need] - {need} for need in needs[name]))
        found += [_Edge(need, name) for need in needs[name] if need not in implied]
    return found


def _columns(stages: Mapping[str, Stage], edges: Sequence[_Edge]) -> dict[str, int]:
    column = dict.fromkeys(stages, 0)
    for _ in stages:  # the longest path is no longer than the number of stages
        for edge in edges:
            column[edge.target] = max(column[edge.target], column[edge.source] + 1)
    return column


def _slots(
    stages: Mapping[str, Stage], edges: Sequence[_Edge], column: Mapping[str, int]
) -> tuple[list[list[Slot]], list[tuple[Slot, Slot]]]:
    """What stands in each column, and what is linked from one column to the next."""
    slots: list[list[Slot]] = [[] for _ in range(max(column.values()) + 1)]
    for name in stages:
        slots[column[name]].append((name, column[name]))
    links: list[tuple[Slot, Slot]] = []
    for edge in edges:
        way: list[Slot] = [(edge.source, column[edge.source])]
        for between in range(column[edge.source] + 1, column[edge.target]):
            way.append((f"{edge.source} > {edge.target}", between))
            slots[between].append(way[-1])
        way.append((edge.target, column[edge.target]))
        links += pairwise(way)
    return slots, links


def _sort(slots: list[list[Slot]], links: Sequence[tuple[Slot, Slot]]) -> None:
    """Order each column by the mean place of its neighbours, so that few arrows cross."""
    for sweep in range(SWEEPS):
        forth = sweep % 2 == 0
        for column in slots if forth else reversed(slots):
            place = {slot: at / len(group) for group in slots for at, slot in enumerate(group)}
            ends = [(b, a) if forth else (a, b) for a, b in links]
            near = {slot: [place[b] for a, b in ends if a == slot] for slot in column}
            column.sort(key=lambda s: sum(near[s]) / len(near[s]) if near[s] else place[s])


def _places(
    slots: Sequence[Sequence[Slot]], column: Mapping[str, int]
) -> dict[Slot, tuple[float, float, float]]:
    """Left, top and height of every slot; columns are centred."""

    def height(slot: Slot) -> float:
        return HEIGHT if column.get(slot[0]) == slot[1] else THIN

    sizes = [sum(map(height, group)) + DOWN * (len(group) - 1) for group in slots]
    found: dict[Slot, tuple[float, float, float]] = {}
    for at, group in enumerate(slots):
        y = 1 + (max(sizes) - sizes[at]) / 2
        for slot in group:
            found[slot] = (1 + at * (WIDTH + ACROSS), y, height(slot))
            y += height(slot) + DOWN
    return found


def _arrow(
    edge: _Edge, column: Mapping[str, int], spots: Mapping[Slot, tuple[float, float, float]]
) -> Markup:
    first, last = column[edge.source], column[edge.target]
    x, y, height = spots[edge.source, first]
    x, y = x + WIDTH, y + height / 2
    text = f"M{x:.1f} {y:.1f}"
    for between in range(first + 1, last + 1):
        passing = f"{edge.source} > {edge.target}" if between < last else edge.target
        left, top, height = spots[passing, between]
        end = top + height / 2
        right = left - (5 if between == last else 0)
        middle = (x + right) / 2
        text += f"C{middle:.1f} {y:.1f} {middle:.1f} {end:.1f} {right:.1f} {end:.1f}"
        x, y = right, end
        if between < last:
            x += WIDTH
            text += f"H{x:.1f}"
    return tag("path", d=text, class_="arrow", marker_end="url(#head)")


def _head() -> Markup:
    shape = tag("path", d="M0 0L7 3.5L0 7Z", class_="head")
    size = {"markerWidth": 7, "markerHeight": 7, "refX": 2, "refY": 3.5}
    marker = tag("marker", shape, id="head", orient="auto", markerUnits="userSpaceOnUse", **size)
    return tag("defs", marker)


def _node(stage: Stage, spot: tuple[float, float, float], facts: Sequence[str]) -> Markup:
    x, y, _ = spot
    lines = [cut(stage.name, 14), *(cut(fact, 23) for fact in facts[:2])]
    title = "; ".join([f"{stage.name}: {stage.state}", *facts, *stage.reasons])
    return tag(
        "a",
        tag("title", title),
        tag("rect", x=x, y=y, width=WIDTH, height=HEIGHT, rx=7, class_="node"),
        label(x + WIDTH - 10, y + 20, MARKS[stage.state], anchor="end", kind="sign"),
        label(x + 11, y + 20, lines[0], kind="title"),
        *(label(x + 11, y + 36 + 16 * at, text) for at, text in enumerate(lines[1:])),
        href=f"#stage-{stage.name}",
        class_=f"state-{stage.state}",
    )


def node_facts(stage: Stage) -> tuple[str, str]:
    """Kind with the time it took, and the figure that tells most."""
    seconds = stage.summary.get("seconds")
    took = f" · {duration(float(seconds))}" if isinstance(seconds, int | float) else ""
    return f"{stage.kind}{took}", _figure(stage)


def _figure(stage: Stage) -> str:
    summary = stage.summary
    if stage.kind == "reward" and isinstance(summary.get("accuracy"), float):
        return f"accuracy {number(summary['accuracy'])}"
    if stage.kind == "sample" and isinstance(summary.get("best_score"), float):
        return f"best of them {number(summary['best_score'])}"
    if stage.kind == "ppo" and isinstance(summary.get("kl"), float):
        return f"score {number(summary.get('score'))}, KL {number(summary['kl'], 2)}"
    if stage.kind == "eval" and summary.get("prompts"):
        return f"{summary['prompts']} prompts"
    if isinstance(summary.get("loss"), float):
        return f"mean loss {number(summary['loss'])}"
    return "not run yet" if stage.state == "missing" else ""
