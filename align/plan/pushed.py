"""What goes to the Hub: the stage `push`, and training stages that push what they leave."""

from pathlib import Path
from typing import Any

from align.config.pushing import Asked, asked_of
from align.config.references import FORM
from align.config.sections import StageConfig
from align.durable import read_json
from align.plan.memory import GIB, weight_bytes
from align.plan.origins import Origin
from align.plan.setting import Result, Setting, StagePlan, origin_of
from align.report.progress import size
from align.resources import display


def plan_push(plan: StagePlan, config: Any, setting: Setting) -> Result:
    """A push by itself: bytes, and the memory that merging takes. Nobody knows the line's speed."""
    plan.seconds = 0.0
    match = FORM.fullmatch(config.run)
    if match is not None:
        plan.model = config.run
        earlier = setting.results.get(match[1], Result())
        origin, artifact = earlier.origin, earlier.artifact
    else:
        plan.model = display(Path(config.run))
        origin, artifact = _of_folder(Path(config.run), setting)
    plan.way = "merged" if config.hub.merged else ""
    note_push(plan, Asked(config.hub, None), origin, artifact)
    return Result()


def _of_folder(run: Path, setting: Setting) -> tuple[Origin | None, float | None]:
    """The model and the bytes of a run by its folder, which may not be there yet."""
    run = run.parent if run.name == "artifact" else run
    outputs = (read_json(run / "lineage.json") or {}).get("outputs") or {}
    sizes = [float(facts["size"]) for facts in outputs.get("files", {}).values()]
    return origin_of(str(run / "artifact"), setting), sum(sizes) or None


def note_own_push(plan: StagePlan, config: StageConfig, result: Result) -> None:
    """The push that a training stage asks for itself."""
    asked = asked_of(config)
    if asked is not None and plan.kind != "push":
        note_push(plan, asked, result.origin, result.artifact)


def note_push(plan: StagePlan, asked: Asked, origin: Origin | None, artifact: float | None) -> None:
    """Write the bytes that a push sends into a plan, and what merging takes."""
    hub, shape = asked.hub, origin.shape if origin is not None else None
    sent, adapter = artifact, origin.adapter if origin is not None else 0
    if hub.merged and (adapter or artifact is None):
        sent = weight_bytes(shape, hub.merged_dtype) if shape is not None else None
    if hub.merged and (adapter or artifact is None) and shape is not None and sent is not None:
        plan.disk["merged weights, until they are pushed"] = sent
        needed = weight_bytes(shape, "float32") / GIB
        where = "on the GPU, or on the host where it does not fit there"
        plan.notes.append(f"merging takes {needed:.1f} GiB of memory (float32), {where}")
    plan.notes.append("the time of the upload is not known")
    said = "a size that is not known yet" if sent is None else size(sent)
    branch = f"@{hub.revision}" if hub.revision else ""
    who = "public" if hub.public else "private"
    plan.pushes.append(f"{said} to {hub.repo_id}{branch} ({who})")
