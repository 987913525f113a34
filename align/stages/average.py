"""`align average`: one model from several, weight by weight, as Llama 3 does (arXiv 2407.21783, section 4.1.5)."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from align.config.sections import PositiveFloat, PositiveInt, StageConfig

if TYPE_CHECKING:
    from align.runs import RunFolder


class AverageConfig(StageConfig):
    """The weighted mean of models, adapters or reward models of one base."""

    stage: Literal["average"] = "average"
    models: dict[str, str]
    """Name -> folder or Hub id of a model or adapter, all of one kind."""
    weights: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Name in `models` -> its weight, relative to the others; 1 where not given."""
    checkpoints: PositiveInt | None = None
    """Average so many of the newest checkpoints that each model's run has kept (`trainer.keep_checkpoints`)."""
    method: Literal["cat", "svd", "merge"] = "cat"
    """How adapters are averaged: exactly with all ranks (`cat`), cut to `svd_rank` (`svd`), or exactly as full weights
    (`merge`)."""
    svd_rank: PositiveInt | None = None
    """Rank that `svd` leaves; the largest of the adapters' when unset."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of full weights; `auto` is the first model's own. An adapter's factors are float32."""
    max_distance: PositiveFloat = 0.5
    """Refuse full models further than this from their mean, relative to its norm: they have no base in common."""


def run(config: AverageConfig, folder: "RunFolder") -> None:
    """Find the members, see that they belong together, average them, report how far they are apart."""
    from align.averaging.factors import average_adapters
    from align.averaging.members import bring_along, find_members
    from align.averaging.weights import average_merged, average_models
    from align.durable import write_json

    if not folder.is_main:
        return
    members = find_members(config)
    if members[0].artifact.base is None:
        report = average_models(members, folder.artifact, config.dtype, config.max_distance)
    elif config.method == "merge":
        report = average_merged(members, folder.artifact, config.dtype)
    else:
        rank = config.svd_rank if config.method == "svd" else None
        report = average_adapters(members, folder.artifact, svd=config.method == "svd", rank=rank)
    bring_along(members[0], folder.artifact)
    write_json(folder.artifact / "average_report.json", report)
    folder.note("models", len(members))
    for key in ("distance", "svd_error"):
        folder.note(key, report.get(key))
    if not folder.quiet:
        _say(folder.name, report)


def _say(name: str, report: dict[str, object]) -> None:
    from align.report.terminal import say

    if isinstance(distance := report.get("distance"), float):
        say(f"{name}: the members are up to {distance:.3g} from their mean, relative to its norm")
    if isinstance(error := report.get("svd_error"), float):
        style = "yellow" if error > 0.1 else ""
        say(
            f"{name}: the cut to rank {report['rank']} leaves out {error:.1%} of the mean",
            style=style,
        )
