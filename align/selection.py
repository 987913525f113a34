"""What the argument of a command names: the stages of a recipe, or the runs below a folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from align.config.load import Loaded, is_pipeline, load_pipeline, load_stage, read_recipe
from align.config.sections import StageConfig
from align.config.suggest import nearest
from align.errors import AlignError, fail
from align.resources import SUFFIXES, find_recipe, shipped_recipes

if TYPE_CHECKING:
    from align.status import StageStatus


def stages_of(
    recipe: str,
    sets: Sequence[str] | None,
    with_stages: Sequence[str] | None,
    stage: str | None,
) -> list[tuple[str, Loaded]]:
    """Prefix and loaded stage: one for a stage's recipe, all (or `stage`) for a pipeline.

    For the recipe of one stage `stage` says which it must be for.
    """
    read = read_recipe(recipe)
    if not is_pipeline(read[0]):
        return [("", load_stage(read, sets or [], stage=stage, ready=False))]
    stages = load_pipeline(read, sets or [], with_stages=with_stages or [], ready=False).stages
    if stage is None:
        return [(f"{name}.", loaded) for name, loaded in stages.items()]
    if stage not in stages:
        close = nearest(stage, stages)
        hint = f"did you mean `{close}`?" if close else f"stages: {', '.join(stages)}"
        fail(f"no stage is called `{stage}`", where=recipe, hint=hint)
    return [(f"{stage}.", stages[stage])]


def to_inspect(
    recipe: str,
    sets: Sequence[str] | None,
    with_stages: Sequence[str] | None,
    stage: str | None,
) -> tuple[Loaded, StageConfig]:
    """The stage that `align inspect` shows, and its config with the artifacts it takes from others.

    Raises:
        AlignError: a pipeline without the stage's name, or an earlier stage has not run.
    """
    from align.config.references import references, substitute
    from align.runs import output_path

    found = stages_of(recipe, sets, with_stages, stage)
    if len(found) > 1:
        names = ", ".join(prefix.rstrip(".") for prefix, _ in found)
        fail(
            "is a pipeline: say which stage", where=recipe, hint=f"add --stage with one of {names}"
        )
    everything = stages_of(recipe, sets, with_stages, None) if found[0][0] else found
    artifacts = {
        prefix.rstrip("."): output_path(loaded.config) / "artifact" for prefix, loaded in everything
    }
    config = found[0][1].config
    for reference in references(config):
        if not artifacts[reference.stage].exists():
            fail(
                f"needs what the stage `{reference.stage}` leaves, and that has not run",
                where=f"{recipe}: {reference.text}",
                hint=f"run `align run {recipe} --until {reference.stage}` first",
            )
    return found[0][1], substitute(config, artifacts)


def places(place: str | None) -> list[str]:
    """The place that is named, or every pipeline's folder below runs/."""
    if place is not None:
        return [place]
    found = sorted(Path("runs").glob("*/pipeline.json"))
    if not found:
        fail("no pipeline has run below runs/", hint="name a pipeline, its folder or a run folder")
    return [str(file.parent) for file in found]


def _refuse_no_run(place: str) -> None:
    """Where a run folder is meant and there is none: name the command that makes it."""
    folder = Path(place)
    if folder.suffix in SUFFIXES or folder.exists():
        return
    hint = "`align run PIPELINE` or `align STAGE --recipe RECIPE` with this output_dir makes it"
    known = False
    for recipe in shipped_recipes():
        output = str(read_recipe(recipe.path)[0].data.get("output_dir"))
        if recipe.kind == "pipeline" and output in map(str, (folder, folder.parent)):
            until = f" --until {folder.name}" if output != str(folder) else ""
            known, hint = True, f"`align run {recipe.name}{until}` makes it"
        elif output == str(folder):
            known, hint = True, f"`align {recipe.kind} --recipe {recipe.name}` makes it"
    if known or folder.parts[:1] == ("runs",):
        fail("there is no run yet", where=place, hint=hint)
    try:
        find_recipe(place)
    except AlignError as error:
        near = error.problems[0].hint or ""
        hint = "`align runs` lists the runs below runs/, `align recipes list` the recipes"
        hint = near if near.startswith(("did you mean", "one of")) else hint
        fail("is no folder and no recipe", where=place, hint=hint)


def run_folder(place: str) -> Path:
    """The folder that is named: a pipeline's, a run's (finished or not), or where a recipe writes.

    Raises:
        AlignError: nothing has run there, with the command that makes it.
    """
    folder = Path(place)
    if not folder.is_dir() and not folder.with_name(f"{folder.name}.partial").is_dir():
        _refuse_no_run(place)
        output = read_recipe(place)[0].data.get("output_dir")
        if not isinstance(output, str):
            hint = "name a pipeline's folder, as in `align report runs/tiny`, or a run folder"
            fail("says no `output_dir`, so there is no run of it to find", where=place, hint=hint)
        folder = Path(output).expanduser()
        if not folder.is_dir() and not folder.with_name(f"{folder.name}.partial").is_dir():
            hint = f"`align run {place}` or the stage's own command makes it"
            fail("there is no run yet", where=output, hint=hint)
    return folder


def states(place: str, sets: Sequence[str], with_stages: Sequence[str]) -> "Sequence[StageStatus]":
    """How the stages of a pipeline (file or folder), or one run, stand."""
    from align.status import PIPELINE_FILE, Plan, run_status, survey

    folder = Path(place)
    if folder.is_dir() or folder.with_name(f"{folder.name}.partial").is_dir():
        if (folder / PIPELINE_FILE).is_file():
            return survey(Plan.read(folder))
        return [run_status(folder)]
    _refuse_no_run(place)
    read = read_recipe(place)
    if is_pipeline(read[0]):
        return survey(Plan.of(load_pipeline(read, sets, with_stages=with_stages, ready=False)))
    return [run_status(Path(load_stage(read, sets, ready=False).config.output_dir))]
