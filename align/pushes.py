"""The push that a training stage asks for itself: asked before it runs, made once it is complete."""

from pathlib import Path

from align.config.pushing import asked_of, kind_of
from align.config.sections import HubSection, StageConfig
from align.durable import read_json
from align.environment import is_main

PUSHED = "pushed.json"
"""In the folder of a run whose own recipe asked for a push: what was pushed, and where."""


def check_push(config: StageConfig) -> None:
    """Before a run that is to be pushed: ask the Hub whether it can be. Does nothing for others, nor for
    the stage `push`, which asks when it sends.

    Raises:
        AlignError: the push would be refused; nothing has run.
    """
    asked = asked_of(config)
    if asked is not None and kind_of(config) != "push":
        from align.hub.account import check_ahead

        check_ahead([asked], way_out="leave `hub` out of the recipe")


def is_pushed(run: Path, hub: HubSection) -> bool:
    """Whether the push that a run's own recipe asks for was made."""
    kept = read_json(run / PUSHED) or {}
    outputs = (read_json(run / "lineage.json") or {}).get("outputs") or {}
    same = kept.get("artifact") == outputs.get("artifact")
    return bool(kept) and same and kept.get("asked") == hub.model_dump()


def push_complete(config: StageConfig, output: Path, name: str) -> None:
    """Push a complete run where its recipe asks for it; once, and from one process.

    Raises:
        NotPushed: it did not come about. The run stays, and the same command tries the push again.
    """
    asked = asked_of(config)
    if asked is not None and kind_of(config) != "push" and is_main():
        from align.hub.push import push_once

        push_once(output, asked.hub, name=name)
