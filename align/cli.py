"""The commands. Light: whatever needs torch is imported by the stage that runs, not here.

A stage's flags are made from its config's fields when its own command is called, so that
`align --help` does not even import pydantic.
"""

import gc
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any

import typer

from align import model_commands, recipe_commands
from align.answers import answer, crash, mistake_in, print_json
from align.errors import AlignError, fail
from align.recipe_commands import Json, Recipe, Sets, With, tell_notes
from align.startup import QUIET, make_ready

AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="Let reward functions come from files.")
]

SUMMARIES = {
    "sft": "Supervised fine-tuning on demonstrations.",
    "reward": "Train a reward model on preference pairs.",
    "sample": "Rejection sampling: draw, score, keep the best, pair best and worst.",
    "dpo": "Direct preference optimization on pairs.",
    "ppo": "Proximal policy optimization against a reward model.",
    "average": "Average models, adapters or checkpoints, weight by weight.",
    "eval": "Answer held-out prompts and score the answers, with intervals.",
    "push": "Upload a run's model with tokenizer, chat template and card. Private unless --public.",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line and exit: 0 done, 2 a mistake to mend, 1 an unexpected error."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    gc.disable()  # a light command is over before there is garbage worth collecting
    words = [_hyphens(word) for word in (sys.argv[1:] if argv is None else argv)]
    words = _optional_pattern(words)
    try:
        build(words)(args=words, prog_name="align", obj=words)
    except AlignError as error:
        sys.exit(answer(error, as_json="--json" in words))
    except Exception as error:
        mistake = mistake_in(error)
        if mistake:
            sys.exit(answer(AlignError(mistake), as_json="--json" in words))
        if os.environ.get("ALIGN_DEBUG") == "1":
            raise
        sys.exit(crash(error))
    finally:
        gc.enable()
        if argv is None:  # the process ends: Python's last collection would visit every object
            gc.freeze()


def _hyphens(word: str) -> str:
    """`--learning_rate=1` as `--learning-rate=1`: both spellings of a flag work."""
    name, equals, value = word.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if re.match(r"--\w", name) else word


def _optional_pattern(words: Sequence[str]) -> list[str]:
    """`--options` without a pattern lists everything."""
    found = []
    for place, word in enumerate(words):
        last = place + 1 == len(words)
        bare = word == "--options" and (last or words[place + 1].startswith("-"))
        found.append("--options=" if bare else word)
    return found


def build(words: Sequence[str]) -> typer.Typer:
    """The app; only stages that are named in the command line get their flags.

    A group's own options are there only when one of them can be meant: typer imports pydantic for
    an option that is not given, `--help` included, and help has to be quick.
    """
    settings = {"help_option_names": ["-h", "--help"]}
    top = not words or words[0].startswith("-")
    completing = f"{os.environ.get('COMP_WORDS', '')} {os.environ.get('_TYPER_COMPLETE_ARGS', '')}"
    named = {*words, *completing.split()}
    app = typer.Typer(
        help="Post-training for Llama 3 and friends: SFT, reward model, rejection sampling, DPO, PPO.",
        no_args_is_help=True,
        add_completion=top,
        add_help_option=top,
        pretty_exceptions_enable=False,
        context_settings=settings,
        rich_markup_mode="rich",
    )
    app.callback()(_top if top else _nothing)
    for kind, summary in SUMMARIES.items():
        command = stage_command(kind) if kind in named else _unused
        app.command(kind, help=summary, rich_help_panel="Stages")(command)
    app.command("run", rich_help_panel="Pipeline")(run)
    app.command("status", rich_help_panel="Pipeline")(status)
    for name, action in model_commands.COMMANDS.items():
        app.command(name, rich_help_panel="Models")(action)
    for name, action in recipe_commands.COMMANDS.items():
        app.command(name, rich_help_panel="Recipes")(action)
    app.add_typer(_recipes(words[1:2], settings), name="recipes", rich_help_panel="Recipes")
    return app


def _recipes(words: Sequence[str], settings: dict[str, Any]) -> typer.Typer:
    recipes = typer.Typer(
        help="List, print and copy the recipes that ship with align; convert those of other tools.",
        no_args_is_help=True,
        add_help_option=not words or words[0].startswith("-"),
        context_settings=settings,
        rich_markup_mode="rich",
    )
    for name, action in recipe_commands.SHIPPED.items():
        recipes.command(name)(action)
    return recipes


def _show_version(on: bool) -> None:
    if on:
        from align import __version__

        print(__version__)
        raise typer.Exit


def _top(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """The options of `align` itself; the commands do the work."""


def _nothing() -> None:
    """`align` without options of its own."""


# --- stages ---------------------------------------------------------------------------------


def _unused() -> None:
    """Stands for a stage that this command line does not name."""


def stage_command(kind: str) -> Callable[..., None]:
    """The command of a stage: its own signature, made from the fields behind its flags."""
    from align.options import everyday

    knobs = everyday(kind)

    def command(**values: Any) -> None:
        if values.get("allow_code"):
            _allow_code()
        flags = {knob.name: values[knob.leaf] for knob in knobs}
        _run_stage_command(
            kind,
            values["ctx"].obj,
            values["recipe"],
            values["sets"] or [],
            {name: value for name, value in flags.items() if value is not None},
            run=values.get("run"),
            options=values["options"],
            dry_run=values["dry_run"],
            as_json=values.get("as_json", False),
        )

    parameters = list(_stage_parameters(kind))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {item.name: item.annotation for item in parameters}
    return command


def _stage_parameters(kind: str) -> Iterable[inspect.Parameter]:
    """Recipe, `--set` and the like, then one option per everyday key."""
    from align.options import PANELS, brief, everyday, flag

    recipe = typer.Option("--recipe", "-r", metavar="RECIPE", help="File or shipped recipe.")
    options = typer.Option(
        "--options", metavar="[PATTERN]", help="List all keys, or those with PATTERN."
    )
    dry_run = typer.Option("--dry-run", help="Print the resolved recipe and stop.")
    yield _parameter("ctx", typer.Context, inspect.Parameter.empty)
    if kind == "push":
        dry_run = typer.Option("--dry-run", help="List the files, send none.")
        of = typer.Argument(
            metavar="[RUN]", help="A complete run that holds a model; or give --recipe."
        )
        yield _parameter("run", Annotated[str | None, of])
    yield _parameter("recipe", Annotated[str | None, recipe])
    yield _parameter("sets", Sets)
    yield _parameter("options", Annotated[str | None, options])
    yield _parameter("dry_run", Annotated[bool, dry_run], False)
    if kind == "eval":
        yield _parameter("as_json", Json, False)
    if kind == "ppo":
        yield _parameter("allow_code", AllowCode, False)
    for knob in everyday(kind):
        switch, name = knob.value == "BOOL", flag(knob.name)
        option = typer.Option(
            f"{name}/--no-{name[2:]}" if switch else name,
            metavar=None if switch else knob.value,
            help=brief(knob),
            rich_help_panel=PANELS[knob.section],
        )
        yield _parameter(knob.leaf, Annotated[(bool if switch else str) | None, option])


def _allow_code() -> None:
    """For this process and those it launches. A flag and no key: a recipe cannot allow itself to run code."""
    from align.environment import ALLOW_CODE

    os.environ[ALLOW_CODE] = "1"


def _parameter(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def _run_stage_command(
    kind: str,
    words: Sequence[str],
    recipe: str | None,
    sets: Sequence[str],
    flags: dict[str, Any],
    *,
    run: str | None,
    options: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    from align.config.load import load_stage
    from align.launch import needs_launch, relaunch
    from align.options import ordered
    from align.runs import recipe_text, run_stage
    from align.views import print_options

    if options is not None:
        if not print_options(kind, options):
            fail(f"no key of `{kind}` has `{options}`", hint=f"`align {kind} --options` lists all")
        return
    if recipe is None and not sets and not flags and run is None:
        fail(
            "nothing to run",
            where=f"align {kind}",
            hint=f"give --recipe RECIPE (`align recipes list`), or flags (`align {kind} --help`)",
        )
    changes = ordered(words, sets, flags)
    if kind == "push":
        model_commands.push(recipe, run, changes, dry_run=dry_run)
        return
    loaded = load_stage(recipe, changes, stage=kind, ready=not dry_run)
    if dry_run:
        print(recipe_text(loaded.config), end="")
        return
    if needs_launch(loaded.config.launch):
        raise typer.Exit(relaunch(words, loaded.config.launch))
    tell_notes(loaded)
    make_ready()
    folder = run_stage(loaded.config, origins=loaded.origins, quiet=as_json)
    if as_json:
        results = folder / "artifact" / "results.json"
        print_json(json.loads(results.read_text(encoding="utf-8")))


# --- pipelines ------------------------------------------------------------------------------


def run(
    pipeline: Recipe,
    sets: Sets = None,
    with_stages: With = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after it.")] = None,
    force: Annotated[
        list[str] | None,
        typer.Option(metavar="STAGE", help="Run it again though nothing changed."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all, say what would run.")
    ] = False,
    allow_code: AllowCode = False,
) -> None:
    """Run a pipeline: only what is not there already; the same command goes on after a stop."""
    from align.config.load import load_pipeline
    from align.pipeline import run_pipeline

    loaded = load_pipeline(pipeline, sets or [], with_stages=with_stages or [])
    if dry_run:
        _show_states(loaded, until, force or [])
        return
    if allow_code:
        _allow_code()
    tell_notes(loaded)
    make_ready()
    run_pipeline(loaded, until=until, force=force or [])


def _show_states(loaded: Any, until: str | None, force: Sequence[str]) -> None:
    from align.pipeline import stage_names
    from align.report.tables import show_status
    from align.status import Plan, survey

    plan = Plan.of(loaded)
    stage_names(plan, until, force)
    show_status(survey(plan))


def status(
    place: Annotated[
        str | None,
        typer.Argument(help="Pipeline, its folder, or a run folder; all below runs/ when unset."),
    ] = None,
    sets: Sets = None,
    with_stages: With = None,
    as_json: Json = False,
) -> None:
    """Show how the stages of a pipeline stand: states, sizes, key metrics."""
    from align.report.tables import show_status
    from align.report.terminal import say
    from align.selection import places, states

    found = {place: states(place, sets or [], with_stages or []) for place in places(place)}
    if as_json:
        stages = [stage.as_json() for group in found.values() for stage in group]
        print_json({"stages": stages})
        return
    for name, group in found.items():
        if len(found) > 1:
            say(name, style="bold", results=True)
        show_status(group)
