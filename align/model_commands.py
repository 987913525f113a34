"""The commands around finished runs: runs, merge, push. As light as `cli.py` until they work."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from align.answers import print_json
from align.errors import fail

if TYPE_CHECKING:
    from align.config.draft import Override

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


def _make_ready() -> None:
    from align import cli

    cli.make_ready()


def merge(
    source: Annotated[
        str, typer.Argument(metavar="RUN_OR_ADAPTER", help="Run folder, adapter or Hub id.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    dtype: Annotated[
        str, typer.Option(help="Type of the saved weights: bfloat16, float16 or float32.")
    ] = "bfloat16",
    data: Annotated[
        str | None, typer.Option(help="Text of the proof: file or card; the run's rows if unset.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of --data.")] = "train",
    max_kl: Annotated[
        float, typer.Option("--max-kl", help="Highest mean KL to the adapter, nats per token.")
    ] = 1e-3,
    as_json: Json = False,
) -> None:
    """Merge an adapter into its base, and prove that the result answers as it did."""
    from typing import get_args

    _make_ready()
    from align.models.merging import Dtype, merge
    from align.views import print_merge

    if dtype not in get_args(Dtype):
        fail(f"no such type: {dtype}", where="--dtype", hint=f"one of {', '.join(get_args(Dtype))}")
    report = merge(source, output, dtype=dtype, data=data, split=split, max_kl=max_kl)  # type: ignore[arg-type]
    if as_json:
        print_json(report)
    else:
        print_merge(str(output), report)


def push(
    recipe: str | None, run: str | None, changes: "Sequence[str | Override]", *, dry_run: bool
) -> None:
    """`align push`: a run folder that is named, or the stage of a recipe with a folder of its own."""
    from align.config.draft import Override
    from align.config.load import load_stage
    from align.hub.push import Push, list_files, push
    from align.runs import run_stage

    given = [Override("run", run, "RUN")] if run is not None else []
    places = [one if isinstance(one, str) else f"{one.key}=" for one in changes]
    direct = recipe is None and not any(one.startswith("output_dir=") for one in places)
    if direct:  # nothing is written but what the push itself needs
        given.append(Override("output_dir", "none"))
    config: Any = load_stage(recipe, [*given, *changes], stage="push").config
    _make_ready()
    asked = Push.of(Path(config.run), config.hub)
    if dry_run:
        list_files(asked)
    elif direct:
        push(asked)
    else:
        run_stage(config)


def runs(
    folder: Annotated[Path, typer.Argument(help="Where to look.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List the runs below a folder: state, stage, size, time, key metrics."""
    from align.status import runs_below

    if not folder.is_dir():
        fail("there is no such folder", where=str(folder), hint="name one, as in `align runs runs`")
    found = runs_below(folder)
    if as_json:
        print_json({"runs": [run.as_json() for run in found]})
        return
    if not found:
        fail(
            "no run lies below this folder",
            where=str(folder),
            hint="`align run PIPELINE` makes one",
        )
    from align.report.tables import show_status

    show_status(found, runs=True)


COMMANDS: dict[str, Any] = {"runs": runs, "merge": merge}
"""Name -> what it does."""
