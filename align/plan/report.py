"""The plan of a recipe: its stages, the totals, and the GPUs that the models need; as data for JSON and view."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from align.config.load import is_pipeline, load_pipeline, load_stage, read_recipe
from align.config.sections import StageConfig
from align.errors import Problem
from align.plan.fleet import fewest_for_inference, fewest_for_training
from align.plan.gpus import DEFAULT, Gpu, find_gpu
from align.plan.pitfalls import pitfalls
from align.plan.setting import Setting, StagePlan
from align.plan.shapes import Shape
from align.plan.stages import plan_stage


@dataclass
class Plan:
    """What a recipe will need on a kind of GPU."""

    recipe: str
    gpu: Gpu
    stages: list[StagePlan]
    configs: dict[str, StageConfig]
    problems: dict[str, list[Problem]]
    """Stage -> what will go wrong."""

    @property
    def shapes(self) -> list[Shape]:
        """The different models of the plan."""
        found = {stage.shape.parameters: stage.shape for stage in self.stages if stage.shape}
        return list(found.values())

    @property
    def seconds(self) -> float | None:
        """All stages one after the other; None where a stage's time is not known."""
        known = [stage.seconds for stage in self.stages]
        return sum(one for one in known if one is not None) if None not in known else None

    @property
    def disk(self) -> float:
        """Bytes of artifacts, checkpoints and downloads."""
        runs = sum(sum(stage.disk.values()) for stage in self.stages)
        return runs + sum(self.downloads.values())

    @property
    def downloads(self) -> dict[str, float]:
        """Hub id -> bytes, where the size is known."""
        return {
            name: size for stage in self.stages for name, size in stage.downloads.items() if size
        }

    def as_json(self) -> dict[str, Any]:
        """Plain values; memory in bytes, time in seconds."""
        return {
            "recipe": self.recipe,
            "gpu": {**asdict(self.gpu), "usable": self.gpu.usable},
            "stages": [self._stage(stage) for stage in self.stages],
            "fewest_gpus": {
                shape.name: {
                    "training": fewest_for_training(shape, self.gpu),
                    "inference": fewest_for_inference(shape, self.gpu),
                }
                for shape in self.shapes
            },
            "seconds": self.seconds,
            "disk_bytes": self.disk,
        }

    def _stage(self, stage: StagePlan) -> dict[str, Any]:
        plain = {
            name: value
            for name, value in vars(stage).items()
            if name not in ("shape", "memory", "training", "length")
        }
        memory = stage.memory
        plain["memory"] = (
            None
            if memory is None
            else {
                **memory.parts,
                "total": memory.total,
                "states": memory.states,
                "phase": memory.phase,
            }
        )
        plain["fits"] = stage.fits(self.gpu)
        plain["problems"] = [
            {"message": one.message, "where": one.where, "hint": one.hint}
            for one in self.problems[stage.name]
        ]
        return plain


def make_plan(
    recipe: str,
    *,
    sets: Sequence[str] = (),
    with_stages: Sequence[str] = (),
    gpu: str | None = None,
    gpus: int | None = None,
) -> Plan:
    """Plan a stage recipe or a pipeline.

    Args:
        recipe: a file or a shipped recipe.
        sets: `KEY=VALUE` overrides.
        with_stages: optional stages of a pipeline that run.
        gpu: the kind of GPU; H100 when None.
        gpus: how many, for every stage; the recipe's own number of processes when None.

    Raises:
        AlignError: the recipe has problems, or there is no such kind of GPU.
    """
    kind = find_gpu(gpu or DEFAULT)
    document = read_recipe(recipe)
    setting = Setting(kind, gpus, Path(document[1]).parent)
    if is_pipeline(document[0]):
        loaded = load_pipeline(document, sets, with_stages=with_stages, ready=False)
        chosen = {name: loaded.stages[name] for name in loaded.chosen}
    else:
        alone = load_stage(document, sets, ready=False)
        chosen = {alone.kind: alone}
    stages, configs, problems = [], {}, {}
    for name, one in chosen.items():
        stage = plan_stage(name, one.kind, one.config, setting)
        stages.append(stage)
        configs[name] = one.config
        problems[name] = pitfalls(stage, one.config, kind)
    return Plan(recipe, kind, stages, configs, problems)
