"""Curves of PPO runs as one picture: reward, KL, explained variance and length by rollout.

    python benchmarks/curves.py --output docs/ppo-curves.png "value adapter=RUN,RUN" "value on the policy=RUN,RUN"

Each group is a name and run folders (one per seed): a thick line for their mean, thin ones for the runs.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = {
    "objective/scores": "reward model's score",
    "objective/kl": "KL to the reference, nats per answer",
    "val/explained_variance": "explained variance of the values",
    "completions/mean_length": "tokens per answer",
}
COLOURS = ("#3366cc", "#cc6633", "#339966", "#884488")


def series(folder: Path, key: str) -> tuple[list[float], list[float]]:
    """Rollouts and values of one figure, from a run's metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = {}
    for line in lines:
        row = json.loads(line)
        if key in row and "episode" in row:
            found[row["episode"]] = row[key]
    episodes = sorted(found)
    size = episodes[0]
    return [episode / size for episode in episodes], [found[episode] for episode in episodes]


def draw(groups: dict[str, list[Path]], output: Path) -> None:
    """One panel per figure, one colour per group."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(15, 3.4))
    for panel, (key, title) in zip(axes, PANELS.items(), strict=True):
        for colour, (name, folders) in zip(COLOURS, groups.items(), strict=False):
            runs = [series(folder, key) for folder in folders]
            for x, y in runs:
                panel.plot(x, y, color=colour, alpha=0.3, linewidth=0.8)
            length = min(len(x) for x, _ in runs)
            mean = [sum(y[at] for _, y in runs) / len(runs) for at in range(length)]
            panel.plot(runs[0][0][:length], mean, color=colour, linewidth=2, label=name)
        if key == "val/explained_variance":
            panel.set_ylim(-1, 1)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("rollout", fontsize=9)
        panel.grid(alpha=0.25)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(output, dpi=110)
    print(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("groups", nargs="+", metavar="NAME=RUN,RUN")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    groups = {}
    for group in options.groups:
        name, _, folders = group.partition("=")
        groups[name] = [Path(folder) for folder in folders.split(",")]
    draw(groups, options.output)


if __name__ == "__main__":
    main()
