"""The commands that read recipes: what they say, mean, need and would train on. As light as `cli.py`."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from align.answers import print_json, problems_json
from align.errors import fail
from align.stages import STAGES
from align.startup import make_ready

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Recipe = Annotated[str, typer.Argument(help="A file, or a shipped recipe (`tiny/pipeline`).")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set any key; repeat for more."),
]
With = Annotated[
    list[str] | None,
    typer.Option("--with", metavar="STAGE", help="Run this optional stage too; repeat for more."),
]
Stage = Annotated[str | None, typer.Option("--stage", help="Stage of a pipeline.")]


def tell_notes(loaded: Any) -> None:
    """What became of the keys of another tool's recipe that runs as it is; one process says it."""
    from align.report.terminal import say

    for note in loaded.notes if os.environ.get("RANK", "0") == "0" else ():
        say(note, style="dim")


def show(
    recipe: Annotated[str | None, typer.Argument(help="A file, or a shipped recipe.")] = None,
    sets: Sets = None,
    with_stages: With = None,
    stage: Stage = None,
    changed: Annotated[
        bool, typer.Option("--changed", help="Leave out what has its default.")
    ] = False,
    judges: Annotated[
        bool, typer.Option("--judges", help="List registered judges and pair rules.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print every value of a recipe and where it comes from."""
    from align.selection import stages_of
    from align.views import print_names, print_values, value_rows

    if judges:
        print_names()
        return
    if recipe is None:
        fail("no recipe is named", hint="as in `align show tiny/pipeline`")
    rows: list[tuple[str, Any, str]] = []
    for prefix, loaded in stages_of(recipe, sets, with_stages, stage):
        rows += value_rows(loaded.config, loaded.origins, prefix)
    rows = [row for row in rows if not changed or row[2] != "default"]
    if as_json:
        print_json({key: {"value": value, "origin": origin} for key, value, origin in rows})
    else:
        print_values(rows)


def validate(
    recipe: Recipe,
    sets: Sets = None,
    with_stages: With = None,
    stage: Annotated[str | None, typer.Option("--stage", help="Stage of a flat recipe.")] = None,
    as_json: Json = False,
) -> None:
    """Check a recipe: every problem at once, with line and way out. Needs no GPU."""
    from align.config.load import is_pipeline, load_pipeline, load_stage, read_recipe

    loaded: Any
    read = read_recipe(recipe)
    if is_pipeline(read[0]):
        loaded = load_pipeline(read, sets or [], with_stages=with_stages or [], ready=False)
        kind = "pipeline"
        tell_notes(loaded)
    else:
        loaded = load_stage(read, sets or [], stage=stage, ready=False)
        kind = loaded.kind
        tell_notes(loaded)
    if as_json:
        pending = problems_json(loaded.pending)["problems"]
        print_json({"ok": True, "kind": kind, "problems": [], "pending": pending})
        return
    from align.report.terminal import sanitise

    said = f"a valid {kind} recipe" if kind in STAGES else "a valid pipeline"
    print(sanitise(f"{recipe}: {said}"))
    for note in loaded.pending:
        print(sanitise(f"    {note.where}: {note.message}"))


def inspect_rows(
    recipe: Recipe,
    stage: Stage = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows to show.")] = 3,
    sets: Sets = None,
    with_stages: With = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per row on stdout.")
    ] = False,
) -> None:
    """Show what a stage really trains on: every token, and whether it is in the loss."""
    from align.selection import to_inspect

    loaded, config = to_inspect(recipe, sets, with_stages, stage)
    tell_notes(loaded)
    make_ready()
    from align.data.inspection import inspect_stage

    inspect_stage(config, rows=rows, as_json=as_json)


def plan(
    recipe: Recipe,
    sets: Sets = None,
    with_stages: With = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="KIND", help="Kind of GPU, as in `4090`; H100 when unset.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs of every stage.")] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Also run a step on fake tensors (imports torch).")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what a recipe will need: memory, time, disk, downloads. No GPU, no weights."""
    from align.plan.report import make_plan

    made = make_plan(recipe, sets=sets or [], with_stages=with_stages or [], gpu=gpu, gpus=gpus)
    counted: list[Any] = []
    if exact:
        make_ready()
        from align.plan.exact import count_exactly

        counted = count_exactly(made, quiet=as_json)
    if as_json:
        print_json(made.as_json() | ({"exact": counted} if exact else {}))
        return
    from align.plan.view import show_exact, show_plan

    show_plan(made)
    if exact:
        show_exact(counted)


def schema(
    kind: Annotated[str, typer.Argument(help="A stage, or `pipeline`.")] = "pipeline",
) -> None:
    """Print the JSON schema of a recipe, for editors."""
    from align.config.schema import KINDS, schema_of
    from align.config.suggest import nearest

    if kind not in KINDS:
        close = nearest(kind, KINDS)
        hint = f"did you mean `{close}`?" if close else f"one of {', '.join(KINDS)}"
        fail(f"there is no schema of `{kind}`", hint=hint)
    print(json.dumps(schema_of(kind)))  # compact: editors read it, and indenting is slow


def list_recipes() -> None:
    """List the shipped recipes: name, stage, what it is."""
    from align.views import print_recipes

    print_recipes()


def print_recipe(name: Recipe) -> None:
    """Print a recipe."""
    from align.report.terminal import sanitise
    from align.resources import find_recipe

    print(sanitise(find_recipe(name).read_text(encoding="utf-8", errors="replace")), end="")


def copy_recipe(
    name: Recipe,
    destination: Annotated[
        Path | None, typer.Argument(help="Folder or file; the current folder when unset.")
    ] = None,
) -> None:
    """Copy a recipe, and what a pipeline builds on, to change it. Never overwrites."""
    from align.report.terminal import say
    from align.resources import copy_recipe, display

    for copy in copy_recipe(name, destination):
        say(display(copy.absolute()), results=True)


def convert_recipe(
    file: Annotated[Path, typer.Argument(help="YAML of the other tool.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The recipe to write.")],
    tool: Annotated[
        str | None,
        typer.Option("--from", metavar="TOOL", help="handbook, trl, llamafactory or axolotl."),
    ] = None,
    stage: Annotated[str | None, typer.Option("--stage", help="What it trains.")] = None,
    as_json: Json = False,
) -> None:
    """Turn a recipe of TRL, its handbook, LLaMA-Factory or axolotl into ours. Never overwrites."""
    from align.translation.writing import convert

    convert(file, output, tool=tool, stage=stage).show(as_json=as_json)


COMMANDS: dict[str, Any] = {
    "show": show,
    "validate": validate,
    "inspect": inspect_rows,
    "plan": plan,
    "schema": schema,
}
"""Name -> what it does."""

SHIPPED: dict[str, Any] = {
    "list": list_recipes,
    "show": print_recipe,
    "copy": copy_recipe,
    "convert": convert_recipe,
}
"""The commands of `align recipes`."""
