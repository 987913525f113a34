"""Commands of the invented world."""

from __future__ import annotations

import argparse
from pathlib import Path

from align.tiny.dataset import write_dataset


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `python -m align.tiny`."""
    parser = argparse.ArgumentParser(prog="python -m align.tiny", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    make_data = commands.add_parser("make-data", help="write the data set as JSONL files")
    make_data.add_argument("--output", type=Path, required=True)
    make_data.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    for path in write_dataset(options.output, options.seed):
        print(path)


if __name__ == "__main__":
    main()
