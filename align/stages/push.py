"""`align push`: a complete run onto the Hub, as a stage of its own."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from align.config.sections import HubSection, StageConfig

if TYPE_CHECKING:
    from align.runs import RunFolder


class PushConfig(StageConfig):
    """Push a complete run to the Hub; the artifact is the record of what the Hub then holds."""

    stage: Literal["push"] = "push"
    run: str
    """Run folder of sft, reward, dpo, ppo or average (in a pipeline the stage: `$dpo`)."""
    hub: HubSection = Field(default_factory=HubSection)


def run(config: PushConfig, folder: "RunFolder") -> None:
    """Push, and keep a record of the address, the commit and the files."""
    from pathlib import Path

    from align.durable import write_json
    from align.hub.push import Push, push

    done = push(Push.of(Path(config.run), config.hub, again="the same command tries again"))
    write_json(folder.artifact / "push.json", done.record())
    folder.note("pushed", done.address)
    folder.note("bytes", done.size)
