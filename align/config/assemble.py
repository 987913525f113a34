"""Reads a pipeline file: for each stage the shared defaults, its base recipe and its own keys."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from align.config.draft import Draft, Layer, Override
from align.config.fields import config_class, leaf_fields
from align.config.problems import KeyPath, RecipeProblem, Source, dotted, shown
from align.config.rounds import Rounds, read_rounds
from align.config.suggest import advice, nearest
from align.config.yaml import Document, read
from align.errors import AlignError, Problem
from align.resources import display, find_recipe
from align.stages import STAGES

STAGE_NAME = re.compile(r"[A-Za-z_][\w-]*")
KEYS = ("output_dir", "defaults", "rounds", "stages")
ROUND_NAME = re.compile(rf"({STAGE_NAME.pattern})@(\d+)")
"""`sft@2`: what differs in one round."""


def _every_key() -> list[str]:
    return [leaf.name for kind in STAGES for leaf in leaf_fields(config_class(kind))]


@dataclass
class PipelineReader:
    """A pipeline file while it is read; everything wrong goes to `problems`."""

    document: Document
    folder: Path
    """Folder of the pipeline file."""
    changes: list[Override]
    problems: list[Problem] = field(default_factory=list)
    _used: set[KeyPath] = field(default_factory=set)
    """Paths in `defaults:` that some stage has, from the file or from an override."""

    def source(self, path: KeyPath) -> Source:
        return Layer(self.document, {}).source(path)

    def tell(self, path: KeyPath, message: str, hint: str | None, value: Any = None) -> None:
        source = self.source(path)
        self.problems.append(RecipeProblem.at(source, "", message, hint, value))

    def mapping(self, key: str) -> Mapping[str, Any]:
        """The mapping under a top-level key; empty where there is none."""
        value = self.document.data.get(key)
        return value if isinstance(value, Mapping) else {}

    def check_top(self) -> None:
        """The keys of the file itself."""
        for key, value in self.document.data.items():
            if key not in KEYS:
                close = nearest(key, KEYS, 0.75)
                hint = f"did you mean `{close}`?" if close else f"one of {', '.join(KEYS)}"
                if close is None and advice(key, _every_key()):
                    hint = "a key for several stages goes under `defaults:`, another into its stage"
                self.tell((key,), f"is no key of a pipeline (value {shown(value)})", hint, value)
            elif key == "rounds" and (isinstance(value, list) or value in ("", {})):
                self.tell((key,), f"must be a number or a mapping, got {shown(value)}", None, value)
            elif (
                key in ("defaults", "stages")
                and value is not None
                and not isinstance(value, Mapping)
            ):
                self.tell((key,), f"must be a mapping, got {shown(value)}", None, value)
        if not self.mapping("stages"):
            self.tell(("stages",), "must name at least one stage", "as in `sft: {stage: sft, ...}`")

    def output_dir(self) -> tuple[str, str]:
        """The folder of the runs, and where it was given."""
        value = self.document.data.get("output_dir")
        origin = self.source(("output_dir",)).origin
        for change in self.changes:
            if change.key == "output_dir":
                value, origin = change.value, change.origin
        if not isinstance(value, str) or not value.strip():
            message = "is required" if value is None else f"must be text, got {shown(value)}"
            self.tell(("output_dir",), message, "the folder below which all stages write", value)
            return "?", origin
        return value, origin

    @cached_property
    def rounds(self) -> Rounds | None:
        """The block of stages that repeats, if the file has one."""

        def tell(source: Source, path: KeyPath, message: str, hint: str | None, value: Any) -> None:
            self.problems.append(RecipeProblem.at(source, dotted(path), message, hint, value))

        given = self.document.data.get("rounds")
        names = list(self.mapping("stages"))
        return read_rounds(given, names, self.source, self.changes, tell)

    @property
    def rounds_are_wrong(self) -> bool:
        """Whether there are rounds that cannot be written out, so that `$name` means nothing yet."""
        return self.rounds is None and self.document.data.get("rounds") is not None

    @cached_property
    def stages(self) -> list[tuple[str, str, int | None]]:
        """Name, entry in `stages:` and round of every stage, in the order in which they run."""
        names = list(self.mapping("stages"))
        if self.rounds is not None or self.rounds_are_wrong:
            names = [name for name in names if not ROUND_NAME.fullmatch(name)]
        if self.rounds is None:
            return [(name, name, None) for name in names]
        return self.rounds.written_out(names)

    @property
    def names(self) -> list[str]:
        """The stages in the order in which they run."""
        return [name for name, _, _ in self.stages]

    def meant(self, name: str) -> list[str]:
        """The stages that a name on the command line stands for: one, or those of all rounds."""
        return self.rounds.all_of(name) if self.rounds else [name]

    def drafts(self) -> dict[str, Draft]:
        """What was given for each stage, overrides and the round's part of it included."""
        found = {}
        for name, entry, number in self.stages:
            draft = self._draft(entry, self.mapping("stages")[entry], number)
            if draft is not None:
                found[name] = draft
        self._tell_rounds_apart()
        self._tell_unused(found)
        for change in self.changes:
            self._override(change, found)
        if self.rounds is not None:
            for name, entry, number in self.stages:
                if name in found:
                    self.rounds.fill(found[name], entry, number)
        return found

    def _tell_rounds_apart(self) -> None:
        """Entries `name@2` whose stage or round there is not."""
        if self.rounds is None:
            return
        for name, entry in self.mapping("stages").items():
            match = ROUND_NAME.fullmatch(name)
            if match and name not in self.names:
                hint = f"stages of the rounds: {', '.join(self.rounds.block)}"
                message = f"is no stage of the {self.rounds.config.number} rounds"
                self.tell(("stages", name), message, hint)
            elif match and (not isinstance(entry, Mapping) or {"stage", "recipe"} & set(entry)):
                hint = f"`stage` and `recipe` belong to `{match[1]}`"
                self.tell(("stages", name), "holds what differs in this round, no more", hint)

    def optional(self) -> list[str]:
        """Names of the stages that run only when asked for."""
        found = []
        for name, key, _ in self.stages:
            entry = self.mapping("stages")[key]
            value = entry.get("optional", False) if isinstance(entry, Mapping) else False
            if not isinstance(value, bool):
                path = ("stages", key, "optional")
                self.tell(path, f"must be true or false, got {shown(value)}", None, value)
            elif value:
                found.append(name)
        return found

    def _draft(self, name: str, entry: Any, number: int | None = None) -> Draft | None:
        path: KeyPath = ("stages", name)
        if not STAGE_NAME.fullmatch(name) or name in KEYS:
            self.tell(path, "is no name for a stage", "use letters, digits, `_` and `-`")
            return None
        if not isinstance(entry, Mapping):
            hint = "as in `{stage: sft, ...}`"
            self.tell(path, f"must be a mapping, got {shown(entry)}", hint, entry)
            return None
        base = self._base(name, entry)
        kind = entry.get("stage", base.data.get("stage") if base else None)
        if not isinstance(kind, str) or kind not in STAGES:
            close = nearest(str(kind), STAGES) if kind is not None else None
            hint = f"did you mean `{close}`?" if close else f"one of {', '.join(STAGES)}"
            message = "is required" if kind is None else f"names no stage: {shown(kind)}"
            self.tell((*path, "stage"), message, hint, kind)
            return None
        inline = Layer(self.document, entry, path, f"{name}.", self.folder)
        draft = Draft(config_class(kind), inline.source(())._replace(key=None), f"{name}.")
        self._add_defaults(draft)
        if base is not None:
            data = {key: value for key, value in base.data.items() if key != "output_dir"}
            file = find_recipe(str(entry["recipe"]), beside=self.folder)
            draft.add(Layer(base, data, folder=file.parent))
        if "output_dir" in entry:
            self._refuse_output_dir(inline.source(("output_dir",)))
            inline.data = {key: value for key, value in entry.items() if key != "output_dir"}
        draft.add(inline)
        if number is not None:
            self._add_own(draft, f"{name}@{number}")
        return draft

    def _add_own(self, draft: Draft, name: str) -> None:
        """Put over a stage what the file has for this round alone."""
        own = self.mapping("stages").get(name)
        if isinstance(own, Mapping):
            layer = Layer(self.document, own, ("stages", name), f"{name}.", self.folder)
            if "output_dir" in own:
                self._refuse_output_dir(layer.source(("output_dir",)))
                layer.data = {key: value for key, value in own.items() if key != "output_dir"}
            draft.add(layer)

    def _base(self, name: str, entry: Mapping[str, Any]) -> Document | None:
        """The recipe file that a stage builds on."""
        given = entry.get("recipe")
        if given is None:
            return None
        try:
            file = find_recipe(str(given), beside=self.folder)
            document = read(file, display(file))
        except AlignError as error:
            self.problems += error.problems
            return None
        self.problems += document.problems
        own, stage = document.data.get("stage"), entry.get("stage")
        if stage is not None and own is not None and stage != own:
            message = f"is a recipe for {shown(own)}, and the stage is {shown(stage)}"
            self.tell(("stages", name, "recipe"), message, "name a recipe of the same stage", given)
        return document

    def _add_defaults(self, draft: Draft) -> None:
        shared = self.mapping("defaults")
        layer = Layer(self.document, shared, ("defaults",), "defaults.", self.folder)
        self._used |= draft.add_defaults(layer)
        for change in self.changes:
            head, _, rest = change.key.partition(".")
            if head == "defaults" and draft.find(rest)[0] is not None:
                draft.override(change, rest)
                self._used.add(("--set", change.key))

    def _tell_unused(self, drafts: Mapping[str, Draft]) -> None:
        """Keys of `defaults:` that no stage has."""
        if not drafts:
            return
        known = {name: None for draft in drafts.values() for name in draft.leaves}
        for key, value in self.mapping("defaults").items():
            inner = value.items() if isinstance(value, Mapping) else ()
            paths: list[tuple[KeyPath, Any]] = [((key, name), item) for name, item in inner]
            for path, item in paths or [((key,), value)]:
                if path not in self._used and path[:1] not in self._used and item != {}:
                    name = dotted(path)
                    hint = advice(name, known, words="did you mean `defaults.{}`?")
                    message = f"is a key of no stage here (value {shown(item)})"
                    self.tell(("defaults", *path), message, hint, item)

    def _override(self, change: Override, drafts: Mapping[str, Draft]) -> None:
        head, _, rest = change.key.removeprefix("stages.").partition(".")
        source = Source(change.origin, key=change.key)
        if change.key == "output_dir" or ("--set", change.key) in self._used:
            return
        if change.key.partition(".")[0] == "rounds" and "rounds" not in drafts:
            return
        meant = [name for name in self.meant(head) if name in drafts]
        if not meant or not rest:
            self._unknown(change, head, drafts)
        elif rest == "output_dir":
            self._refuse_output_dir(source)
        elif rest in ("stage", "recipe", "optional"):
            hint = "change it in the pipeline file"
            problem = RecipeProblem.at(source, rest, "cannot be set here", hint, change.value)
            self.problems.append(problem)
        else:
            for name in meant:
                drafts[name].override(change, rest)

    def _unknown(self, change: Override, head: str, drafts: Mapping[str, Draft]) -> None:
        bare = change.key.removeprefix("defaults.")
        having = [name for name, draft in drafts.items() if draft.find(bare)[0]]
        names = [*drafts, "defaults", "output_dir"]
        close = nearest(head, names) if head not in names else None
        known = {name: None for draft in drafts.values() for name in draft.leaves}
        if having:
            hint: str | None = f"name the stage: `{having[0]}.{bare}`, or all: `defaults.{bare}`"
        elif close:
            hint = f"did you mean `{change.key.replace(head, close, 1)}`?"
        elif head == "defaults":
            hint = advice(bare, known, words="did you mean `defaults.{}`?")
        else:
            hint = f"begin with a stage: {', '.join(drafts)}"
        message = f"names no stage and no key here (value {shown(change.value)})"
        source = Source(change.origin, key=change.key)
        self.problems.append(RecipeProblem.at(source, change.key, message, hint, change.value))

    def _refuse_output_dir(self, source: Source) -> None:
        hint = "a stage of a pipeline writes to <output_dir of the pipeline>/<its name>"
        self.problems.append(RecipeProblem.at(source, "output_dir", "cannot be given here", hint))
