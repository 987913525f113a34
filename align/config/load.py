"""Recipes and pipelines from YAML and the command line, checked all at once.

Precedence: defaults < recipe < `--set` and flags, in the order given. In a pipeline: the fields'
own defaults < the pipeline's `defaults:` < a stage's `recipe:` < its inline keys < `--set`.
Mappings of files are merged key by key, everything else is replaced. A relative path is looked for
in the current folder, then beside the file that names it, then among what ships with
align; `output_dir` is relative to the current folder.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from align.config.draft import Draft, Layer, Override, parse_override
from align.config.fields import config_class
from align.config.paths import Trouble
from align.config.problems import RecipeProblem, Source, in_order, shown
from align.config.pushing import push_troubles, same_place
from align.config.references import check, drop_unused
from align.config.sections import StageConfig
from align.config.suggest import nearest
from align.config.yaml import Document, read
from align.errors import AlignError, Problem, fail
from align.resources import display, find_recipe
from align.stages import STAGES

if TYPE_CHECKING:
    from align.config.pipeline import PipelineConfig


class Loaded(NamedTuple):
    """A stage's config and where it comes from."""

    config: StageConfig
    kind: str
    """The stage: `sft`, `reward`, `sample`, ..."""
    path: Path
    origins: Mapping[str, str]
    """Dotted key -> `default`, `recipe.yaml:12`, `--set` or a flag's name."""
    pending: tuple[RecipeProblem, ...] = ()
    """Inputs that another run has to write first."""
    notes: tuple[str, ...] = ()
    """Keys that were given by another tool's names, and what became of them."""


class LoadedPipeline(NamedTuple):
    """A pipeline, its stages in order, and where every value comes from."""

    config: "PipelineConfig"
    path: Path
    stages: Mapping[str, Loaded]
    """Name -> stage, also the optional ones that do not run."""
    chosen: tuple[str, ...]
    """Names of the stages that run, in order."""
    output_origin: str
    pending: tuple[RecipeProblem, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Keys that were given by another tool's names, each once."""
        return tuple(dict.fromkeys(note for stage in self.stages.values() for note in stage.notes))

    @property
    def origins(self) -> dict[str, str]:
        """Dotted key, with the stage's name in front -> where its value comes from."""
        found = {"output_dir": self.output_origin}
        for name, stage in self.stages.items():
            found |= {f"{name}.{key}": origin for key, origin in stage.origins.items()}
        return found


Read = tuple[Document, Path]
"""A recipe as it was read, and its file."""


def read_recipe(path: str | Path) -> Read:
    """Read a file or a shipped recipe; syntax errors are AlignErrors with file and line."""
    file = find_recipe(str(path))
    return read(file, display(file)), file


def _read(recipe: str | Path | Read) -> Read:
    return recipe if isinstance(recipe, tuple) else read_recipe(recipe)


def is_pipeline(document: Document) -> bool:
    """Whether a file is a pipeline, and not the recipe of one stage."""
    return "stages" in document.data


def _overrides(texts: Iterable[str | Override], problems: list[Problem]) -> list[Override]:
    found = []
    for text in texts:
        try:
            found.append(parse_override(text))
        except AlignError as error:
            problems += error.problems
    return found


def _kind(document: Document, stage: str | None) -> str:
    """The stage that a recipe is for."""
    given = document.data.get("stage", stage)
    where = f"{document.name}:{document.lines.get(('stage',), 1)}"
    if given is None:
        hint = f"add `stage:` with one of {', '.join(STAGES)}"
        fail("does not say which stage it is for", where=document.name, hint=hint)
    if not isinstance(given, str) or given not in STAGES:
        close = nearest(str(given), STAGES)
        hint = f"did you mean `{close}`?" if close else f"one of {', '.join(STAGES)}"
        fail(f"`stage` names no stage: {shown(given)}", where=where, hint=hint)
    if stage is not None and given != stage:
        hint = f"run `align {given} --recipe {document.name}`"
        fail(f"is a recipe for `{given}`, not for `{stage}`", where=where, hint=hint)
    return str(given)


def load_stage(
    path: str | Path | Read | None,
    overrides: Sequence[str | Override] = (),
    *,
    stage: str | None = None,
    flags: Mapping[str, Any] | None = None,
    ready: bool = True,
) -> Loaded:
    """Load the recipe of one stage.

    Args:
        path: a file, the name of a shipped recipe, or what `read_recipe` read; None where
            overrides give everything. A flat recipe of TRL or the handbook is one too.
        overrides: `KEY=VALUE` in the order given; a later one wins.
        stage: the stage it must be for; the recipe's own `stage:` when None.
        flags: further values by key, which win over `overrides`.
        ready: refuse inputs that another run has to write first; else they are listed in `pending`.

    Raises:
        AlignError: with every problem of the recipe at once.
    """
    nothing = Document("the command line", {}, {}, {}), Path.cwd() / "recipe.yaml"
    document, file = nothing if path is None else _read(path)
    if is_pipeline(document):
        fail(
            "is a pipeline, not the recipe of one stage",
            where=document.name,
            hint=f"run it with `align run {document.name}`",
        )
    from align.translation.reading import as_ours

    document, notes = as_ours(document, file, stage)
    kind = _kind(document, stage)
    problems: list[Problem] = list(document.problems)
    draft = Draft(config_class(kind), Source(document.name, document.name, folder=file.parent))
    draft.add(Layer(document, document.data, folder=file.parent))
    changes = _overrides(overrides, problems)
    changes += [Override(key, value, f"--{key}") for key, value in (flags or {}).items()]
    for change in changes:
        draft.override(change)
    config, pending = draft.complete()
    if config is not None and not draft.problems:
        for trouble in push_troubles(config):
            draft.tell(trouble)
    problems += draft.problems
    if problems or config is None:
        raise AlignError(*in_order(problems))
    if ready and pending:
        raise AlignError(*pending)
    told = (*map(str, notes), *draft.notes)
    return Loaded(config, kind, file, draft.origins(), tuple(pending), told)


def _choose(
    optional: Sequence[str], names: Sequence[str], with_stages: Sequence[str]
) -> tuple[list[str], list[Problem]]:
    """The stages that run, and what is wrong with `--with`."""
    problems = []
    for name in with_stages:
        if name not in names:
            close = nearest(name, optional or names)
            hint = f"optional stages: {', '.join(optional) or 'none'}"
            hint = f"did you mean `--with {close}`?" if close else hint
            problems.append(Problem(f"names no stage: `{name}`", "--with", hint))
    return [name for name in names if name not in optional or name in with_stages], problems


def _complete(
    drafts: Mapping[str, Draft], chosen: Sequence[str]
) -> tuple[dict[str, StageConfig], list[RecipeProblem]]:
    """The configs of all stages, and the inputs that stages which run still lack."""
    configs: dict[str, StageConfig] = {}
    pending: list[RecipeProblem] = []
    for name, draft in drafts.items():
        config, missing = draft.complete(in_pipeline=True)
        pending += missing if name in chosen else []
        if config is not None:
            configs[name] = config
    return configs, pending


def _connect(
    name: str,
    drafts: Mapping[str, Draft],
    configs: dict[str, StageConfig],
    optional: Sequence[str],
    chosen: Sequence[str],
) -> None:
    """Check what a stage takes from others, and drop the models of stages that do not run."""
    draft = drafts[name]
    troubles: list[Trouble] = []
    if name in chosen:
        unused = [other for other in optional if other not in chosen]
        configs[name], troubles = drop_unused(configs[name], unused)
    # A stage that does not run may refer to others that do not run either.
    running = chosen if name in chosen else optional
    told = {trouble.key[0] for trouble in troubles}
    troubles += [t for t in check(name, configs, optional, running) if t.key[0] not in told]
    if not troubles and name in chosen:
        troubles = [*push_troubles(configs[name], configs)]
        running_configs = {other: configs[other] for other in configs if other in chosen}
        if twin := same_place(running_configs, name):
            message = f"is where `{twin}` pushes to as well, and one model would replace the other"
            hint = "name another repository, or another branch with `hub.revision`"
            troubles.append(Trouble(("hub", "repo_id"), message, hint))
    for trouble in troubles:
        draft.tell(trouble)


def load_pipeline(
    path: str | Path | Read,
    overrides: Sequence[str | Override] = (),
    *,
    with_stages: Sequence[str] = (),
    ready: bool = True,
) -> LoadedPipeline:
    """Load a pipeline and check every stage of it, the optional ones too.

    Args:
        path: a file, the name of a shipped pipeline, or what `read_recipe` read.
        overrides: `STAGE.KEY=VALUE`, `defaults.KEY=VALUE` or `output_dir=VALUE`; a later one wins.
        with_stages: optional stages that are to run.
        ready: refuse inputs that another run has to write first; else they are listed in `pending`.

    Raises:
        AlignError: with every problem of every stage at once.
    """
    from align.config.assemble import PipelineReader
    from align.config.pipeline import PipelineConfig, PipelineStage

    document, file = _read(path)
    if not is_pipeline(document):
        kind = document.data.get("stage")
        known = isinstance(kind, str) and kind in STAGES
        hint = f"run it with `align {kind} --recipe {document.name}`" if known else None
        fail("is no pipeline: it has no `stages`", where=document.name, hint=hint)
    problems: list[Problem] = list(document.problems)
    reader = PipelineReader(document, file.parent, _overrides(overrides, problems), problems)
    reader.check_top()
    output_dir, output_origin = reader.output_dir()
    drafts, optional = reader.drafts(), reader.optional()
    asked = [name for given in with_stages for name in reader.meant(given)]
    chosen, wrong = _choose(optional, reader.names, asked)
    problems += wrong
    for name, draft in drafts.items():
        draft.override(Override("output_dir", str(Path(output_dir) / name), output_origin))
    configs, pending = _complete(drafts, chosen)
    if list(configs) == reader.names and not reader.rounds_are_wrong:
        for name in configs:
            _connect(name, drafts, configs, optional, chosen)
    problems += [problem for draft in drafts.values() for problem in draft.problems]
    if problems:
        # A mistake in the shared defaults is found in each stage that has the key, and told once.
        raise AlignError(*in_order(problems))
    if ready and pending:
        raise AlignError(*pending)
    stages, parts = {}, {}
    for name, config in configs.items():
        told = tuple(drafts[name].notes)
        stages[name] = Loaded(config, drafts[name].kind, file, drafts[name].origins(), notes=told)
        parts[name] = PipelineStage(config=config, optional=name in optional)
    whole = PipelineConfig(output_dir=output_dir, stages=parts)
    return LoadedPipeline(whole, file, stages, tuple(chosen), output_origin, tuple(pending))


__all__ = [
    "Loaded",
    "LoadedPipeline",
    "RecipeProblem",
    "config_class",
    "is_pipeline",
    "load_pipeline",
    "load_stage",
    "read_recipe",
]
