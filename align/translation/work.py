"""A translation in the making: what was taken of the other tool's file, what was given to ours."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from align.config.fields import LeafField, config_class, leaf_fields
from align.config.yaml import Document
from align.translation.kinds import Tool
from align.translation.rules import Fate, Note


@dataclass
class Work:
    """Reads a document key by key; every key leaves a note."""

    tool: Tool
    stage: str
    document: Document
    folder: Path
    """Folder of the document."""
    data: dict[str, Any] = field(default_factory=dict)
    """Our dotted key -> value."""
    sources: dict[str, str] = field(default_factory=dict)
    """Our dotted key -> their key."""
    notes: list[Note] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)
    remarks: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.leaves: dict[str, LeafField] = {
            leaf.name: leaf for leaf in leaf_fields(config_class(self.stage))
        }

    @property
    def given(self) -> Mapping[str, Any]:
        return self.document.data

    def line(self, key: str) -> int | None:
        return self.document.lines.get((key,))

    def take(self, key: str) -> Any:
        """The value of a key, which counts as read from now on."""
        self.taken.add(key)
        return self.given.get(key)

    def ours(self, name: str) -> str | None:
        """The dotted key that has this bare name here; None where none or several have it."""
        if name in self.leaves:
            return name
        same = [leaf.name for leaf in self.leaves.values() if leaf.leaf == name]
        return same[0] if len(same) == 1 else None

    def say(self, key: str, fate: Fate, to: str | None = None, reason: str = "") -> None:
        self.notes.append(Note(key, fate, to, reason, self.line(key)))

    def remark(self, key: str, words: str) -> None:
        """A word that goes behind the note on a key, once."""
        found = self.remarks.setdefault(key, [])
        if words not in found:
            found.append(words)

    def give(
        self, ours: str, value: Any, key: str, reason: str = "", *, quiet: bool = False
    ) -> None:
        """Set one of our keys from theirs; the first one given wins, and the note says so."""
        if ours not in self.leaves:
            self.say(key, "dropped", None, f"`align {self.stage}` has no `{ours}`")
            return
        if ours in self.data and self.sources.get(ours) != key:
            same = self.data[ours] == value
            other = self.sources[ours]
            self.say(key, "dropped", None, f"{'the same as' if same else 'overruled by'} `{other}`")
            return
        self.data[ours] = value
        self.sources[ours] = key
        if not quiet:
            self.say(key, self.fate(ours, value, key), ours, reason)

    def fate(self, ours: str, value: Any, key: str) -> Fate:
        if ours == key:
            return "kept"
        if ours.rpartition(".")[2] != key:
            return "renamed"
        return "moved" if value == self.given.get(key) else "changed"

    def extra(self, key: str, value: Any) -> None:
        """An argument of the trainer without a key of its own."""
        self.data.setdefault("trainer.extra", {})[key] = value
        self.sources.setdefault("trainer.extra", key)
        self.say(key, "moved", f"trainer.extra.{key}")

    def add(self, ours: str, value: Any, reason: str) -> None:
        """A key that their file leaves to a default that is not ours."""
        if ours in self.leaves and ours not in self.data:
            self.data[ours] = value
            self.notes.append(Note(ours, "added", None, reason, None, value))

    def finished(self) -> list[Note]:
        """All notes in the order of the file, with their remarks; added keys last."""
        told: list[Note] = []
        for note in self.notes:
            words = "; ".join([*filter(None, [note.reason]), *self.remarks.pop(note.key, ())])
            told.append(replace(note, reason=words))
        last = max(self.document.lines.values(), default=0) + 1
        return sorted(told, key=lambda note: last if note.line is None else note.line)
