"""What masking the format tokens in DPO prevents, in the tiny world: answers that break off or never end.

    align run recipes/tiny/pipeline.yaml --until best
    python benchmarks/format_mask.py [--run runs/tiny] [--seeds 0 1 2] [--learning-rate 1e-3] [--epochs 1]

From the SFT model and the sampled pairs of a finished run, DPO at beta 0.1 four times for each seed: plain, with the
format mask, with the NLL term (0.2), with both. Then all models answer the held-out prompts at temperature 1. Reported:
score, share of answers that end by themselves, tokens of an answer, and the share that end in a repeated phrase.
Writes results/format-mask-<learning rate>-<epochs>.json and .md.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

HERE = Path(__file__).parent
VARIANTS = {
    "plain": (),
    "mask": ("mask_format_tokens=true",),
    "nll": ("rpo_alpha=0.2",),
    "mask + nll": ("rpo_alpha=0.2", "mask_format_tokens=true"),
}
REPEATED = re.compile(r"(\S+(?: \S+){0,4}?)(?:[ ,.]+\1){2,}\W*$")
"""A phrase of one to five words, three times at the end."""


def align(stage: str, settings: list[str]) -> None:
    """Run one stage as a user would."""
    flags = [part for setting in settings for part in ("--set", setting)]
    subprocess.run([sys.executable, "-m", "align", stage, *flags], check=True)


def train(run: Path, name: str, more: tuple[str, ...], seed: int, options: Any) -> Path:
    """DPO of one variant; returns the artifact."""
    output = run / f"format-mask-{options.label}" / f"{name.replace(' + ', '-')}-{seed}"
    if not output.exists():
        settings = [
            f"output_dir={output}",
            f"model_name_or_path={run / 'sft' / 'artifact'}",
            f"dataset_name={run / 'best' / 'artifact' / 'pairs.jsonl'}",
            "max_length=256",
            "lora_r=32",
            "lora_alpha=64",
            "per_device_train_batch_size=32",
            "gradient_checkpointing=false",
            "lr_scheduler_type=linear",
            "warmup_steps=0.05",
            f"learning_rate={options.learning_rate}",
            f"num_train_epochs={options.epochs}",
            f"trainer.seed={seed}",
        ]
        align("dpo", [*settings, *more])
    return output / "artifact"


def answers(run: Path, models: dict[str, Path], seed: int, options: Any) -> list[dict[str, Any]]:
    """Every model's answers to the held-out prompts at temperature 1."""
    import pyarrow.parquet as pq

    output = run / f"format-mask-{options.label}" / f"eval-{seed}"
    if not output.exists():
        named = json.dumps({name: str(path) for name, path in models.items()})
        settings = [f"output_dir={output}", f"models={named}", f"seed={seed}"]
        settings += ["dataset_name=tiny-world", "dataset_train_split=test", "judge=tiny_world"]
        settings += ["temperatures=[1.0]", "max_new_tokens=56", "generation_batch_size=256"]
        align("eval", settings)
    rows: list[dict[str, Any]] = pq.read_table(output / "artifact" / "answers.parquet").to_pylist()
    return rows


def measure(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the answers of one model."""
    return {
        "score": mean(row["score"] for row in rows),
        "ended": mean(float(row["ended"]) for row in rows),
        "tokens": mean(row["tokens"] for row in rows),
        "repeated tail": mean(float(bool(REPEATED.search(row["answer"]))) for row in rows),
    }


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: mean over the seeds, and the least and greatest."""
    keys = ["score", "ended", "tokens", "repeated tail"]
    lines = [f"| DPO | {' | '.join(keys)} |", "|---|" + "---|" * len(keys)]
    for name, runs in found.items():
        cells = []
        for key in keys:
            values = [run[key] for run in runs]
            cells.append(f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--epochs", type=float, default=1)
    options = parser.parse_args()
    options.label = f"{options.learning_rate:g}-{options.epochs:g}"
    found: dict[str, list[dict[str, float]]] = {}
    for seed in options.seeds:
        models = {"sft": options.run / "sft" / "artifact"}
        for name, more in VARIANTS.items():
            models[name] = train(options.run, name, more, seed, options)
        rows = answers(options.run, models, seed, options)
        for name in models:
            found.setdefault(name, []).append(measure([r for r in rows if r["model"] == name]))
    settings = {
        "learning_rate": options.learning_rate,
        "epochs": options.epochs,
        "seeds": options.seeds,
    }
    results = HERE / "results" / f"format-mask-{options.label}"
    Path(f"{results}.json").write_text(
        json.dumps({"settings": settings, "found": found}, indent=2) + "\n"
    )
    said = f"learning rate {options.learning_rate:g}, {options.epochs:g} epochs, "
    said += f"seeds {options.seeds}: mean (least to greatest)"
    Path(f"{results}.md").write_text(
        f"# Format mask and NLL in DPO, tiny world\n\n{said}\n\n{table(found)}\n"
    )
    print(table(found))


if __name__ == "__main__":
    main()
