"""`align run`: the stages of a pipeline in order, each only where its result is not there already.

A stage is looked at when its turn comes, by the content of its inputs: a stage before it that ran
again and gave the same artifact changes nothing after it. Runs that are replaced move to
`<output_dir>/.old/` and come back from there when a recipe is changed back.
"""

import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from align.config.load import LoadedPipeline
from align.config.problems import dotted
from align.config.pushing import Asked, asked_of, kind_of
from align.config.references import references
from align.config.sections import HubSection, StageConfig
from align.config.suggest import nearest
from align.durable import free_name, read_json, rename, write_json, write_text
from align.errors import AlignError, NotPushed, Problem, fail
from align.launch import launched_world, needs_launch, relaunch
from align.lineage import Identity, identify
from align.locks import locked
from align.pushes import PUSHED, is_pushed, push_complete
from align.report.progress import duration
from align.report.tables import key_metrics, show_table, write_table
from align.report.terminal import say
from align.resources import display
from align.runs import given, output_path, recipe_text, run_stage
from align.secrets import scrub, scrubbed
from align.stages import OUTSIDE
from align.standing import refuse, standing
from align.status import PIPELINE_FILE, Plan, StageStatus, survey
from align.stopping import Stopped, stoppable

OLD = ".old"


def run_pipeline(
    loaded: LoadedPipeline, *, until: str | None = None, force: Sequence[str] = ()
) -> Path:
    """Run the stages of a pipeline that are not complete and unchanged; returns its folder.

    Args:
        loaded: a checked pipeline.
        until: the last stage to run.
        force: stages that run again although nothing changed.

    Raises:
        AlignError: a stage failed, with what to mend; the stages before it stay.
    """
    if (launched_world() or 1) > 1:
        fail(
            "a pipeline starts its own processes",
            where="align run",
            hint="run it without a launcher, and set launch.num_processes in the stages",
        )
    plan = Plan.of(loaded)
    names = stage_names(plan, until, force)
    with stoppable():
        found = {stage.name: stage for stage in survey(plan)}
        _refuse_foreign(plan, names, found)
        pushes = _pushes(plan, names, found)
        if not force and not pushes and all(found[name].state == "complete" for name in names):
            say(f"nothing to do: all {len(names)} stages are complete and unchanged", style="green")
            _finish(plan, names, write=not (plan.output / "table.md").exists())
            return plan.output
        if pushes:
            from align.hub.account import check_ahead

            check_ahead(pushes, way_out="leave the push out of the pipeline for now")
        with locked(plan.output):
            try:
                again = {one for name in force for one in meant(plan, name)}
                _Walk(plan, names, again).go()
            except Exception as error:
                if plan.output.exists() and not isinstance(error, Stopped):
                    _report(plan.output)  # what there is, and what failed
                raise
        return plan.output


def stage_names(plan: Plan, until: str | None, force: Sequence[str]) -> list[str]:
    """The stages to look at, in order. Raises AlignError where `until` or `force` name none.

    `sft` stands for `sft@1`, `sft@2`, ... of a pipeline with rounds: it runs until the last of them.
    """
    for key, wanted in [("--until", until), *(("--force", name) for name in force)]:
        if wanted is not None and not meant(plan, wanted):
            close = nearest(wanted, plan.chosen)
            hint = f"did you mean `{close}`?" if close else f"stages: {', '.join(plan.chosen)}"
            fail(f"no stage that runs is called `{wanted}`", where=key, hint=hint)
    names = list(plan.chosen)
    return names[: names.index(meant(plan, until)[-1]) + 1] if until else names


def meant(plan: Plan, name: str) -> list[str]:
    """The stages that run and that a name stands for: itself, or the same stage of all rounds."""
    return [one for one in plan.chosen if name in (one, one.partition("@")[0])]


def _refuse_foreign(plan: Plan, names: Sequence[str], found: dict[str, StageStatus]) -> None:
    """Before anything runs: no stage may have to write where something else lies."""
    for name in names:
        if found[name].state == "foreign":
            output = output_path(plan.configs[name])
            refuse(output, standing(output, Identity({}, {})))


def _pushes(plan: Plan, names: Sequence[str], found: dict[str, StageStatus]) -> list[Asked]:
    """The pushes to the Hub that this walk will come to."""
    pushes = []
    for name in names:
        config = plan.configs[name]
        asked = asked_of(config, plan.configs)
        done = found[name].state == "complete"
        if asked is not None and done and kind_of(config) not in OUTSIDE:
            done = is_pushed(output_path(config), asked.hub)
        if asked is not None and not done:
            pushes.append(asked)
    return pushes


def _finish(plan: Plan, names: Sequence[str], *, write: bool) -> None:
    """Show what came out, when the last stage is through, and where everything lies."""
    if names[-1] == plan.chosen[-1]:
        if write:
            write_table(plan)
        show_table(plan)
    say(f"everything lies in {display(plan.output)}/")
    _report(plan.output)


def _report(folder: Path) -> None:
    """Bring the report up to date and say where it is; a run never fails because of its report."""
    from align.report.html.writing import write_report

    try:
        file = write_report(folder)
    except Stopped:
        raise
    except Exception as error:
        if isinstance(error, AlignError):
            reason = "; ".join(str(problem) for problem in error.problems)
        else:
            reason = f"{type(error).__name__}: {error}"
        say(f"no report: {scrub(reason)}", style="yellow")
        say(f"    the run is not touched by this; `align report {display(folder)}` tries again")
        return
    say(f"report: {display(file)}", results=True)


class _Walk:
    """One walk over the stages; keeps pipeline.json up to date."""

    def __init__(self, plan: Plan, names: Sequence[str], force: set[str]) -> None:
        self.plan, self.names, self.force = plan, names, force
        self.file = plan.output / PIPELINE_FILE
        self.unpushed: dict[str, NotPushed] = {}
        """Stages whose push failed: nothing waits for them."""
        kept = read_json(self.file) or {}
        self.record = {
            "recipe": plan.recipe,
            "chosen": list(plan.chosen),
            "seconds": kept.get("seconds", 0.0),
            "stages": {
                name: {
                    "kind": plan.kind(name),
                    "needs": list(plan.needs(name)),
                    "config": scrubbed(config.model_dump(mode="json", exclude_unset=True))
                    | {"output_dir": str(output_path(config))},
                    "origins": given(plan.origins.get(name, {})),
                }
                for name, config in plan.configs.items()
            },
        }

    def go(self) -> None:
        """Walk through; afterwards show the table."""
        started = time.monotonic()
        before = float(self.record["seconds"])
        self.plan.output.mkdir(parents=True, exist_ok=True)
        write_json(self.file, self.record)
        for name in self.names:
            try:
                self.stage(name)
            except NotPushed as error:
                self.unpushed[name] = error
                say(f"{name}: not pushed, the other stages go on: {error.problems[0]}", style="red")
                self.note(name, failure=str(error.problems[0])[:300])
            except AlignError as error:
                self.failed(name, error)
            except Exception as error:
                self.note(name, failure=f"{type(error).__name__}: {error}"[:300])
                raise
            finally:
                self.record["seconds"] = round(before + time.monotonic() - started, 3)
                write_json(self.file, self.record)
                self.tidy()
        _finish(self.plan, self.names, write=True)
        if self.unpushed:
            self.not_pushed()

    def stage(self, name: str) -> None:
        """Bring one stage to completion, by leaving it, bringing it back or running it."""
        config = self.plan.resolved(name)
        output, identity = output_path(config), identify(config)
        found = standing(output, identity)
        forced = name in self.force
        if found.state == "unchanged" and not forced:
            say(f"{name}: unchanged")
            push_complete(config, output, name)
            self.note(name, fingerprint=identity.fingerprint)
            return
        if found.state == "foreign":
            refuse(output, found)
        if found.state != "absent":
            self.retire(name, output, found.reasons or ("asked for by --force",))
        if not forced and self.bring_back(name, output, identity):
            push_complete(config, output, name)
            self.note(name, fingerprint=identity.fingerprint)
            return
        self.run(name, config)
        self.note(name, fingerprint=identity.fingerprint)

    def run(self, name: str, config: StageConfig) -> None:
        """Run one stage, here or in processes of its own, and say how it ended."""
        number = self.plan.chosen.index(name) + 1
        say(f"[{number}/{len(self.plan.chosen)}] {name} ({self.plan.kind(name)})", style="bold")
        if needs_launch(config.launch):
            self.launch(name, config)
            push_complete(config, output_path(config), name)
        else:
            sources = {
                dotted(found.path): found.stage for found in references(self.plan.configs[name])
            }
            run_stage(config, name=name, inputs=sources, origins=self.plan.origins.get(name))
            _free_memory()
        summary = read_json(output_path(config) / "summary.json") or {}
        figures = ", ".join(f"{key} {value}" for key, value in key_metrics(summary))
        took = duration(float(summary.get("seconds", 0.0)))
        say(f"{name}: done in {took}" + (f" ({figures})" if figures else ""), style="green")

    def launch(self, name: str, config: StageConfig) -> None:
        """Run one stage in several processes, by its own command; a push is not theirs."""
        if isinstance(hub := getattr(config, "hub", None), HubSection):
            config = config.model_copy(update={"hub": type(hub)()})
        recipe = self.plan.output / ".recipes" / f"{name}.yaml"
        recipe.parent.mkdir(parents=True, exist_ok=True)
        write_text(recipe, recipe_text(config))
        code = relaunch([self.plan.kind(name), "--recipe", str(recipe)], config.launch)
        if code > 128:
            raise Stopped(code - 128)
        if code != 0:
            fail(f"ended with exit code {code}", where=name, hint="its own message stands above")

    def retire(self, name: str, output: Path, reasons: Sequence[str]) -> None:
        """Move a run that is replaced to `.old/`; nothing is deleted."""
        kept = read_json(output / "lineage.json") or {}
        mark = str(kept.get("fingerprint", "unknown"))[:8]
        aside = free_name(self.plan.output / OLD / f"{name}-{mark}")
        aside.parent.mkdir(parents=True, exist_ok=True)
        rename(output, aside)
        shown = "; ".join(reasons[:3]) + (" ..." if len(reasons) > 3 else "")
        say(f"{name}: runs again ({shown}); the run before is kept in {display(aside)}")

    def bring_back(self, name: str, output: Path, identity: Identity) -> bool:
        """Take a run of this very recipe and these inputs back from `.old/`, if there is one."""
        kept = self.plan.output / OLD / f"{name}-{identity.fingerprint[:8]}"
        if self.plan.kind(name) in OUTSIDE or standing(kept, identity).state != "unchanged":
            return False
        (kept / PUSHED).unlink(missing_ok=True)  # the Hub may hold the run in between by now
        if output.exists():
            output.rmdir()  # an empty folder, or it would not be absent
        rename(kept, output)
        say(f"{name}: this very run was kept in {OLD}/ and is back")
        return True

    def tidy(self) -> None:
        """Leave no folder behind when the first stage refused its input."""
        if [path.name for path in self.plan.output.iterdir()] == [PIPELINE_FILE]:
            self.file.unlink()
            self.plan.output.rmdir()

    def note(self, name: str, **facts: str) -> None:
        """Put a stage's outcome into the record."""
        stage = self.record["stages"][name]
        for key in ("failure", "fingerprint"):
            stage.pop(key, None)
        stage |= scrubbed(facts)

    def not_pushed(self) -> None:
        """Say which pushes failed; everything else is done and stays."""
        problems = [one for error in self.unpushed.values() for one in error.problems]
        names = ", ".join(f"`{name}`" for name in self.unpushed)
        goes_on = (
            f"`align run {display(Path(self.plan.recipe))}` tries that again, and nothing else"
        )
        told = NotPushed(*problems, Problem(f"not pushed: {names}; all else is done", hint=goes_on))
        told.exit_code = max(error.exit_code for error in self.unpushed.values())
        raise told

    def failed(self, name: str, error: AlignError) -> None:
        """Say what failed, what stays and how to go on, with the error's own exit code."""
        self.note(name, failure=str(error.problems[0])[:300] if error.problems else str(error))
        done = self.names[: self.names.index(name)]
        stays = f"; {', '.join(done)} stay as they are" if done else ""
        word = "was stopped" if isinstance(error, Stopped) else "failed"
        told = AlignError(
            *error.problems,
            Problem(
                f"the stage `{name}` {word}{stays}",
                hint=f"`align run {display(Path(self.plan.recipe))}` goes on from here",
            ),
        )
        told.exit_code = error.exit_code
        raise told from None


def _free_memory() -> None:
    """Give the models of the stage before back, so that each stage has the whole machine."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
