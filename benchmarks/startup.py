"""The light floor: `align --help` and friends against importing the libraries they stand on.

    python benchmarks/startup.py [--runs 15]

Interleaves the commands (A B C ... A B C ...), prints the median CPU seconds of each whole process and its ratio to
`python -c "import typer, rich, pydantic, yaml"`. The floor allows a ratio of 2. Writes results/startup.json.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PIPELINE = str(HERE.parent / "recipes" / "tiny" / "pipeline.yaml")
ALLOWED = 2.0

COMMANDS = {
    "import typer, rich, pydantic, yaml": ["-c", "import typer, rich, pydantic, yaml"],
    "align --help": ["-m", "align", "--help"],
    "align sft --help": ["-m", "align", "sft", "--help"],
    "align recipes list": ["-m", "align", "recipes", "list"],
    "align validate recipes/tiny/pipeline.yaml": ["-m", "align", "validate", PIPELINE],
    "align schema sft": ["-m", "align", "schema", "sft"],
}


ENVIRONMENT = {
    name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
}
"""Compiled files are kept as Python keeps them by default: the libraries compared with have theirs."""


def cpu_seconds(arguments: list[str]) -> float:
    """CPU seconds (user + system) of one fresh Python process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, env=ENVIRONMENT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for round_ in range(runs + 1):
        for name, arguments in COMMANDS.items():
            seconds = cpu_seconds(arguments)
            if round_:  # the first round fills caches
                times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = next(iter(medians.values()))
    rows = [
        {"command": name, "median_cpu_seconds": round(value, 3), "ratio": round(value / base, 2)}
        for name, value in medians.items()
    ]
    for row in rows:
        print(f"{row['ratio']:5.2f}x  {row['median_cpu_seconds']:.3f} s  {row['command']}")
    result = {
        "runs": runs,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "allowed_ratio": ALLOWED,
        "rows": rows,
    }
    path = HERE / "results" / "startup.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    slow = [row["command"] for row in rows if row["ratio"] > ALLOWED]
    sys.exit(f"above {ALLOWED}x: {', '.join(slow)}" if slow else 0)


if __name__ == "__main__":
    main()
