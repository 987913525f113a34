"""The commands around finished runs: runs, merge, push. As light as `cli.py` until they work."""

from pathlib import Path
from typing import Annotated, Any

import typer

from align.answers import print_json
from align.errors import fail

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
    onto: Annotated[
        str, typer.Option(help="QLoRA: `trained` (dequantized base) or `original` weights.")
    ] = "trained",
    as_json: Json = False,
) -> None:
    """Merge an adapter into its base, and prove that the result answers as it did."""
    from typing import get_args

    _make_ready()
    from align.models.merging import Dtype, Onto, merge
    from align.views import print_merge

    for key, value, known in (("dtype", dtype, Dtype), ("onto", onto, Onto)):
        if value not in get_args(known):
            fail(f"is none: {value}", where=f"--{key}", hint=f"one of {', '.join(get_args(known))}")
    report = merge(
        source,
        output,
        dtype=dtype,  # type: ignore[arg-type]
        data=data,
        split=split,
        max_kl=max_kl,
        onto=onto,  # type: ignore[arg-type]
    )
    if as_json:
        print_json(report)
    else:
        print_merge(str(output), report)


def push(
    run: Annotated[Path, typer.Argument(help="A complete run folder of sft, reward, dpo or ppo.")],
    repo_id: Annotated[str, typer.Option("--repo-id", metavar="ORG/NAME", help="On the Hub.")],
    merged: Annotated[bool, typer.Option("--merged", help="Merged weights, no adapter.")] = False,
    public: Annotated[bool, typer.Option("--public", help="Private when unset.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; made if missing.")] = None,
    pr: Annotated[bool, typer.Option("--pr", help="Open a pull request instead.")] = False,
    collection: Annotated[
        str | None, typer.Option(metavar="SLUG", help="Add the model to this collection.")
    ] = None,
    base_model_id: Annotated[
        str | None,
        typer.Option(
            "--base-model-id", metavar="ID", help="The base on the Hub, if here a folder."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Sample answers in the card.")] = 3,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files, send none.")] = False,
) -> None:
    """Upload a run's model with tokenizer, chat template and card. Private unless --public."""
    _make_ready()
    from align.hub.push import Push, push

    push(
        Push(
            run=run,
            repo_id=repo_id,
            merged=merged,
            public=public,
            revision=revision,
            pr=pr,
            collection=collection,
            base_model_id=base_model_id,
            samples=samples,
        ),
        dry_run=dry_run,
    )


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


COMMANDS: dict[str, Any] = {"runs": runs, "merge": merge, "push": push}
"""Name -> what it does."""
