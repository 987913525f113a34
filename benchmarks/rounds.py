"""What rounds bring in the tiny world, and what the mean of two rounds' weights does.

    python benchmarks/rounds.py [--runs runs] [--seeds 0 1 2]

Walks recipes/tiny/rounds.yaml once for each seed (runs that are there already are not repeated). Collects the greedy
scores of the held-out prompts with their intervals, the distance of the averaged models from their mean, and the rows
that each round's stages read. Writes results/rounds.json and .md.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def walk(folder: Path, seed: int) -> dict[str, Any]:
    """One run of the recipe; what came out."""
    settings = [f"output_dir={folder}", f"defaults.seed={seed}"]
    flags = [part for setting in settings for part in ("--set", setting)]
    subprocess.run([sys.executable, "-m", "align", "run", "tiny/rounds", *flags], check=True)
    results = read(folder / "eval" / "artifact" / "results.json")
    return {
        "seed": seed,
        "scores": {row["label"]: row["scores"]["score"] for row in results["rows"]},
        "distance": read(folder / "mean" / "artifact" / "average_report.json")["distance"],
        "rows": {f"{stage}@{n}": rows(folder / f"{stage}@{n}") for n in (1, 2) for stage in ("reward", "sft", "dpo")},
        "seconds": read(folder / "table.json")["seconds"],
    }  # fmt: skip


def read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def rows(run: Path) -> list[int]:
    """Rows of each source that a stage read."""
    return [source["rows"] for source in read(run / "lineage.json")["data"]["sources"]]


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: a line per model and a column per seed."""
    seeds = [f"seed {run['seed']}" for run in found]
    lines = [f"| greedy score | {' | '.join(seeds)} |", "|---|" + "---|" * len(seeds)]
    for name in found[0]["scores"]:
        scores = [run["scores"][name] for run in found]
        cells = [f"{one['mean']:.3f} [{one['low']:.3f} {one['high']:.3f}]" for one in scores]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    apart = " | ".join(f"{run['distance']:.3f}" for run in found)
    lines.append(f"| distance of the two rounds' weights from their mean | {apart} |")
    for stage in found[0]["rows"]:
        read_by = " | ".join(" + ".join(map(str, run["rows"][stage])) for run in found)
        lines.append(f"| rows read by {stage} | {read_by} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    found = [walk(options.runs / f"rounds-{seed}", seed) for seed in options.seeds]
    text = (
        "# Rounds in the tiny world\n\nrecipes/tiny/rounds.yaml: two rounds of preferences, reward model, rejection "
        "sampling, SFT from the base and DPO, then the mean of both rounds' policies; 400 held-out prompts, "
        f"95 % intervals\n\n{table(found)}\n"
    )
    (HERE / "results" / "rounds.md").write_text(text, encoding="utf-8")
    (HERE / "results" / "rounds.json").write_text(
        json.dumps(found, indent=2) + "\n", encoding="utf-8"
    )
    print(text)


if __name__ == "__main__":
    main()
