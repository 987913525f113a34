"""A file of another tool where a recipe of ours is expected: run as it is, or sent to `convert`."""

from pathlib import Path

from align.config.yaml import Document
from align.errors import fail
from align.translation.kinds import TITLES, tool_of
from align.translation.rules import Note
from align.translation.translate import translate


def as_ours(document: Document, file: Path, stage: str | None) -> tuple[Document, list[Note]]:
    """A flat recipe of TRL or the handbook in our words; any other document as it is.

    Keys that nobody knows stay, so that they are told as mistakes.

    Raises:
        AlignError: the file is LLaMA-Factory's or axolotl's, or trains what align does not offer.
    """
    tool = tool_of(document.data)
    if tool is None:
        return document, []
    if tool in ("llamafactory", "axolotl"):
        fail(
            f"is a recipe of {TITLES[tool]}",
            where=document.name,
            hint=f"convert it first: align recipes convert {document.name} --output recipe.yaml",
        )
    made = translate(document, file, tool=tool, stage=stage)
    ours = made.document(document)
    lines = dict(ours.lines)
    for note in made.notes:
        if note.fate == "unknown":
            ours.data[note.key] = document.data[note.key]
            lines[(note.key,)] = note.line or 1
    kept = Document(ours.name, ours.data, lines, ours.texts, ours.problems)
    return kept, [note for note in made.notes if note.fate not in ("kept", "moved", "unknown")]
