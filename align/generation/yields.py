"""What a sampling run yielded: in a report, in warnings, and in the terminal."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from align.evaluation.statistics import growth_with_samples, share
from align.generation.answers import Group
from align.report.terminal import console, say

Row = dict[str, Any]

HISTOGRAM_BINS = 20


def yield_report(groups: Sequence[Group], sft: Sequence[Row], pairs: Sequence[Row]) -> Row:
    """What the run yielded, for report.json.

    Scores are those of all samples. `growth` is exact over all subsets of a prompt's samples, so
    it says what fewer samples would have brought.
    """
    answers = [answer for group in groups for answer in group.answers]
    scores = np.array([[a.verdict["score"] for a in group.answers] for group in groups])
    counts, edges = np.histogram(scores, bins=HISTOGRAM_BINS)
    best = [max((a.verdict["score"] for a in g.answers if a.kept), default=None) for g in groups]
    gaps = [b - float(row.mean()) for b, row in zip(best, scores, strict=True) if b is not None]
    margins = [pair["margin"] for pair in pairs if "margin" in pair]
    report = {
        "prompts": len(groups),
        "samples_per_prompt": scores.shape[1],
        "completions": len(answers),
        "tokens": sum(len(answer.all_ids) for answer in answers),
        "mean_tokens": sum(len(answer.all_ids) for answer in answers) / len(answers),
        "finished": share([answer.ended for answer in answers]),
        "duplicates": duplicate_share(groups),
        "score": {
            "mean": float(scores.mean()),
            "deviation": float(scores.std()),
            "deviation_within_prompts": float(scores.std(axis=1).mean()),
            "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
        },
        "growth": growth_with_samples(scores),
        "demonstrations": len(sft),
        "prompts_without_demonstration": sum(value is None for value in best),
        "kept_gap": float(np.mean(gaps)) if gaps else None,
        "pairs": len(pairs),
        "pairs_by_kind": dict(Counter(str(pair.get("kind", "pair")) for pair in pairs)),
        "prompts_with_pair": len({repr(pair["prompt"]) for pair in pairs}),
        "mean_margin": float(np.mean(margins)) if margins else None,
    }
    return report | {"warnings": warnings(report)}


def duplicate_share(groups: Sequence[Group]) -> float:
    """Share of the answers that repeat another answer to their prompt."""
    total = sum(len(group.answers) for group in groups)
    distinct = sum(len({answer.text for answer in group.answers}) for group in groups)
    return (total - distinct) / total if total else 0.0


def warnings(report: Mapping[str, Any]) -> list[str]:
    """What a reader should mend before going on with the samples."""
    found = []
    if report["finished"] < 0.5:
        found.append(
            f"only {report['finished']:.0%} of the completions ended by themselves: raise "
            "generation.max_new_tokens, or check that the model was trained to end its turns"
        )
    if not report["demonstrations"]:
        found.append("no completion was kept: lower pairs.min_score, or set only_finished: false")
    if not report["pairs"]:
        found.append("no pair was found: lower pairs.min_gap, or raise num_generations")
    if report["samples_per_prompt"] > 1 and report["duplicates"] > 0.5:
        found.append(
            f"{report['duplicates']:.0%} of the completions repeat another one: raise "
            "generation.temperature"
        )
    return found


def say_report(name: str, report: Mapping[str, Any]) -> None:
    """Print the report: a few lines, the growth with the samples, and what should be mended."""
    for line in summary_lines(report):
        say(f"{name}: {line}")
    if len(report["growth"]) > 1:
        console().print(growth_table(report))
    for line in report["warnings"]:
        say(f"{name}: warning: {line}", style="yellow")


def growth_table(report: Mapping[str, Any]) -> Table:
    """The score against the number of samples, for the terminal."""
    table = Table("samples", "mean", "median", "best", title="score against samples per prompt")
    for row in report["growth"]:
        table.add_row(str(row["n"]), *(f"{row[key]:.3f}" for key in ("mean", "median", "max")))
    return table


def summary_lines(report: Mapping[str, Any]) -> list[str]:
    """The report in a few lines, for the terminal."""
    kinds = ", ".join(f"{n} {kind}" for kind, n in report["pairs_by_kind"].items())
    gap = "" if report["kept_gap"] is None else f", {report['kept_gap']:+.3f} over the mean"
    return [
        f"{report['completions']} completions of {report['prompts']} prompts, "
        f"{report['tokens']} tokens ({report['mean_tokens']:.1f} each)",
        f"{report['finished']:.1%} ended by themselves, {report['duplicates']:.1%} repeat another",
        f"{report['demonstrations']} demonstrations kept{gap}",
        f"{report['pairs']} pairs of {report['prompts_with_pair']} prompts"
        + (f" ({kinds})" if kinds else ""),
    ]
