"""What can be wrong with a push before there is anything to push: told by `validate`, without network."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from align.config.paths import Trouble
from align.config.references import FORM, base_of, produces
from align.config.sections import HubSection, StageConfig

HUB_ID = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]{0,95}")
"""`ORG/NAME` as the Hub takes it; huggingface_hub's own check follows when something is sent."""


class Coming(NamedTuple):
    """What a stage will leave, as far as its recipe tells."""

    kind: str
    """`adapter`, `policy`, `reward adapter`, `reward model`, `samples`, ..."""
    base: str
    """The model that the stage starts from: a Hub id, a folder, or `$name`."""
    roots: tuple[str, ...]
    """The models on which the first stages stand."""

    @property
    def adapter(self) -> bool:
        return self.kind in ("adapter", "reward adapter")


class Asked(NamedTuple):
    """A push that a recipe asks for."""

    hub: HubSection
    coming: Coming | None
    """None where the run is a folder that no stage of this recipe makes."""

    @property
    def sends_adapter(self) -> bool | None:
        """Whether an adapter is sent; None where that is not known yet."""
        return None if self.coming is None else self.coming.adapter and not self.hub.merged


def asked_of(config: StageConfig, stages: Mapping[str, StageConfig] | None = None) -> Asked | None:
    """The push that a stage asks for, with what it will push; None where it asks for none."""
    hub = getattr(config, "hub", None)
    if not isinstance(hub, HubSection) or hub.repo_id is None:
        return None
    target: StageConfig | None = config
    if kind_of(config) == "push":
        match = FORM.fullmatch(str(getattr(config, "run", "")))
        target = (stages or {}).get(match[1]) if match else None
    return Asked(hub, coming_from(target, stages or {}) if target else None)


def kind_of(config: StageConfig) -> str:
    """The kind of a stage: `sft`, `push`, ..."""
    return str(config.model_dump(include={"stage"})["stage"])


def coming_from(config: StageConfig, stages: Mapping[str, StageConfig]) -> Coming | None:
    """What a stage will leave; None for stages that leave no model."""
    base = base_of(config, stages)
    if kind_of(config) in ("sample", "eval", "push") or base is None:
        return None
    return Coming(produces(config, stages), base, tuple(_roots(base, stages, len(stages) + 1)))


def _roots(name: str, stages: Mapping[str, StageConfig], steps: int) -> Iterator[str]:
    match = FORM.fullmatch(name)
    if match is None:
        yield name
        return
    base = base_of(stages[match[1]], stages) if match[1] in stages else None
    if base is not None and steps > 0:
        yield from _roots(base, stages, steps - 1)


def is_here(name: str) -> bool:
    """Whether a model's name means a folder of this machine: there, or left by another stage."""
    return FORM.fullmatch(name) is not None or Path(name).is_absolute()


def plain_troubles(config: Any) -> Iterator[Trouble]:
    """What the `hub` section alone shows."""
    hub, is_push = config.hub, kind_of(config) == "push"
    given = [
        key for key, value in hub.model_dump(exclude_defaults=True).items() if key != "repo_id"
    ]
    if hub.repo_id is None:
        if is_push:
            yield Trouble(("hub", "repo_id"), "is required", "as in `repo_id: my-org/my-model`")
        elif given:
            key = given[0]
            hint = "set `hub.repo_id: ORG/NAME`, or leave it out"
            hint += "; the model's own is `model.model_revision`" if key == "revision" else ""
            yield Trouble(("hub", key), "says how to push, and nothing is pushed", hint)
    elif not HUB_ID.fullmatch(hub.repo_id) or hub.repo_id.endswith(".git"):
        hint = "the form is `ORG/NAME`: letters, digits, `-`, `_`, `.`"
        yield Trouble(("hub", "repo_id"), f"is no id of the Hub: `{hub.repo_id}`", hint)
    if hub.base_model_id is not None and not HUB_ID.fullmatch(hub.base_model_id.split("@")[0]):
        message = f"is no id of the Hub: `{hub.base_model_id}`"
        yield Trouble(("hub", "base_model_id"), message, "the form is `ORG/NAME[@REVISION]`")
    if hub.pr and hub.revision is not None:
        hint = "leave `pr` or `revision` out"
        yield Trouble(("hub", "revision"), "and `hub.pr`: a pull request is against main", hint)
    if "merged_dtype" in given and not hub.merged and hub.repo_id is not None:
        message = "is the type of merged weights, and nothing is merged"
        yield Trouble(("hub", "merged_dtype"), message, "set `hub.merged: true`, or leave it out")
    if is_push and (config.launch.num_processes > 1 or config.launch.accelerate is not None):
        key = "num_processes" if config.launch.num_processes > 1 else "accelerate"
        hint = "leave it out, or set `launch: {num_processes: 1, accelerate: null}` in this stage"
        yield Trouble(("launch", key), "starts processes, and a push is one", hint)


def push_troubles(
    config: StageConfig, stages: Mapping[str, StageConfig] | None = None
) -> Iterator[Trouble]:
    """What is wrong with pushing what a stage will leave.

    Args:
        config: the stage that asks for the push.
        stages: all stages of its pipeline by name; `$name` in the config is one of them.
    """
    asked = asked_of(config, stages)
    if asked is None or asked.coming is None:
        return
    hub, coming = asked.hub, asked.coming
    if hub.merged and coming.kind == "reward adapter":
        hint = "push the adapter, or leave it merged: `merge_adapter: true` (`method: merge` of an average)"
        message = "merges a reward model's adapter, which align does not do after training"
        yield Trouble(("hub", "merged"), message, hint)
    if asked.sends_adapter and hub.base_model_id is None and is_here(coming.base):
        match = FORM.fullmatch(coming.base)
        made = f"the stage `{match[1]}` made" if match else f"lies here ({coming.base})"
        message = f"gets an adapter whose base {made}, and nobody else can load that"
        merge = "" if coming.kind == "reward adapter" else ", or `hub.merged: true`"
        hint = f"push that base too and set `hub.base_model_id: ORG/NAME`{merge}"
        yield Trouble(("hub", "repo_id"), message, hint, ("hub.base_model_id", "hub.merged"))
    yield from _licence(hub, coming)


def _licence(hub: HubSection, coming: Coming) -> Iterator[Trouble]:
    from align.hub.licences import llama_licence

    names = [root if not is_here(root) else Path(root).name for root in coming.roots]
    names += [hub.base_model_id.split("@")[0]] if hub.base_model_id else []
    licence = llama_licence(names, _config_of(coming.roots))
    owner, _, name = str(hub.repo_id).partition("/")
    if hub.public and licence is not None and not licence.allows(name):
        better = f"{owner}/{licence.prefix.replace(' ', '-')}-{name}"
        message = f"is public, and Llama's licence asks that the name begin with `{licence.prefix}`"
        yield Trouble(("hub", "repo_id"), message, f"as in `{better}`", ("hub.public",))


def _config_of(roots: tuple[str, ...]) -> dict[str, Any]:
    """config.json of the first root that lies here."""
    for root in roots:
        file = Path(root) / "config.json"
        if Path(root).is_absolute() and file.is_file():
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
            except ValueError:
                continue
            return found if isinstance(found, dict) else {}
    return {}


def same_place(stages: Mapping[str, StageConfig], name: str) -> str | None:
    """An earlier stage that pushes to the very branch that the stage `name` pushes to."""
    mine = asked_of(stages[name])
    if mine is None or mine.hub.pr:
        return None
    for other, config in stages.items():
        if other == name:
            return None
        theirs = asked_of(config)
        if theirs is not None and not theirs.hub.pr and _branch(theirs.hub) == _branch(mine.hub):
            return other
    return None


def _branch(hub: HubSection) -> tuple[str, str]:
    return str(hub.repo_id), hub.revision or "main"
