"""What a stage logged while it ran, as small charts."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from align.report.html.gather import Stage
from align.report.html.metrics import Point, thinned
from align.report.html.svg import Frame, dot, path
from align.report.html.text import number


@dataclass(frozen=True)
class Panel:
    """A chart with up to three lines."""

    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]
    """Figure in metrics.jsonl, and what the legend calls it."""


LOSS = Panel("loss", "nats", (("loss", "training"), ("eval_loss", "held-out")))
GRADIENT = Panel("gradient norm", "", (("grad_norm", "before clipping"),))
RATE = Panel("learning rate", "", (("learning_rate", "policy"),))

PANELS: dict[str, tuple[Panel, ...]] = {
    "sft": (
        LOSS,
        Panel(
            "tokens right at the first guess",
            "share",
            (("mean_token_accuracy", "training"), ("eval_mean_token_accuracy", "held-out")),
        ),
        Panel("entropy", "nats per token", (("entropy", "training"),)),
        GRADIENT,
        RATE,
    ),
    "reward": (
        LOSS,
        Panel("accuracy", "share", (("accuracy", "training"), ("eval_accuracy", "held-out"))),
        Panel("margin", "reward", (("margin", "training"), ("eval_margin", "held-out"))),
        Panel(
            "reward",
            "",
            (("mean_reward", "mean"), ("min_reward", "least"), ("max_reward", "greatest")),
        ),
        GRADIENT,
        RATE,
    ),
    "dpo": (
        LOSS,
        Panel(
            "implicit reward",
            "beta x log-ratio",
            (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected")),
        ),
        Panel(
            "pairs in the right order",
            "share",
            (("rewards/accuracies", "training"), ("eval_rewards/accuracies", "held-out")),
        ),
        Panel(
            "log-probability",
            "nats per answer",
            (("logps/chosen", "chosen"), ("logps/rejected", "rejected")),
        ),
        GRADIENT,
        RATE,
    ),
    "ppo": (
        Panel(
            "score of the rollout",
            "reward",
            (("objective/scores", "as scored"), ("objective/reward", "as used")),
        ),
        Panel("KL to the reference", "nats per answer", (("objective/kl", "k1"),)),
        Panel("mean length", "tokens", (("completions/mean_length", "answers"),)),
        Panel(
            "answers",
            "share",
            (("completions/eos_rate", "end their turn"), ("completions/unique_rate", "different")),
        ),
        Panel(
            "explained variance",
            "share",
            (("val/explained_variance", "of the returns, by the values"),),
        ),
        Panel("entropy", "nats per token", (("objective/entropy", "policy"),)),
        Panel(
            "loss",
            "",
            (("loss", "in all"), ("loss/policy_avg", "policy"), ("loss/value_avg", "value")),
        ),
        Panel("clipped ratios", "share", (("policy/clipfrac_avg", "of the tokens"),)),
        Panel(
            "gradient norm",
            "",
            (("grad_norm/policy", "policy"), ("grad_norm/value", "value")),
        ),
    ),
}
"""Kind of a stage -> its charts, the most telling first."""

FIRST = 3
"""Charts of a stage that are seen without opening anything."""


@dataclass(frozen=True)
class Curve:
    """A drawn panel with its legend."""

    title: str
    unit: str
    image: Markup
    legend: tuple[tuple[str, str, str], ...]
    """Colour class, name, last value."""


def curves(stage: Stage) -> list[Curve]:
    """The charts of a stage for which something was logged."""
    found = []
    for panel in PANELS.get(stage.kind, (LOSS, GRADIENT, RATE)):
        lines = [(name, stage.metrics.series(key)) for key, name in panel.lines]
        drawn = [(name, points) for name, points in lines if len(points) > 1]
        if drawn:
            found.append(_curve(panel, drawn))
    return found


def _curve(panel: Panel, lines: Sequence[tuple[str, list[Point]]]) -> Curve:
    thin = [thinned(points) for _, points in lines]
    steps = [step for points in thin for step, _ in points]
    values = [value for points in thin for _, value in points]
    frame = Frame.around([0.0, *steps], values, "step", panel.unit)
    drawn = []
    legend = []
    for place, ((name, points), few) in enumerate(zip(lines, thin, strict=True)):
        drawn.append(path(map(frame.at, few), f"line s{place} d{place}"))
        last_step, last = points[-1]
        said = f"{name}: {number(last)} at step {last_step:.0f}"
        drawn.append(dot(*frame.at(few[-1]), f"mark s{place}", said, 3.0))
        legend.append((f"s{place} d{place}", name, number(last)))
    shown = ", ".join(f"{name} ends at {value}" for _, name, value in legend)
    return Curve(
        panel.title, panel.unit, frame.draw(f"{panel.title}: {shown}", *drawn), tuple(legend)
    )
