"""`align recipes convert`: the translated recipe as YAML with a comment per key."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from align.answers import print_json
from align.config.fields import config_class, sections
from align.config.load import load_stage
from align.config.suggest import nearest
from align.config.yaml import Document, parse, plain, read
from align.errors import AlignError, Problem, fail
from align.report.terminal import sanitise, say
from align.resources import SUFFIXES, display, exists
from align.stages import STAGES
from align.translation.kinds import TITLES, Tool
from align.translation.translate import Translation, translate


def _comment(text: str) -> str:
    """Text that stays inside a comment whatever the other file had in it: one line, no controls."""
    return sanitise(" ".join(text.split()))


ODD_BREAKS = frozenset("\r\x85\u2028\u2029")
"""Line breaks of YAML that only double quotes keep apart from a line feed."""


class _Dumper(yaml.SafeDumper):
    """Quotes what our reader would take for a number though YAML 1.1 takes it for text."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "'" if not isinstance(plain(value), str) else "|" if "\n" in value else None
    if set(value) & ODD_BREAKS:
        style = '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def _lines(key: str, value: Any, comment: str | None, indent: str) -> list[str]:
    text = yaml.dump({key: value}, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    first, *rest = text.rstrip("\n").split("\n")
    if comment:
        first = (
            f"{indent}# {comment}\n{indent}{first}" if rest else f"{indent}{first}   # {comment}"
        )
    else:
        first = f"{indent}{first}"
    return [first, *(f"{indent}{line}" if line else line for line in rest)]


def recipe_text(made: Translation, name: str) -> str:
    """A translation as YAML: sections, comments on renamed keys, and what was left out on top."""
    title = TITLES[made.tool]
    head = [
        f"# {made.stage}, converted from {title}'s {_comment(name)} by `align recipes convert`."
    ]
    left = [note for note in made.notes if note.fate in ("dropped", "unknown")]
    if left:
        head += ["# Left out:", *(f"#   {_comment(str(note))}" for note in left)]
    told: dict[str, str] = {}
    for note in made.notes:
        if note.fate == "added":
            told.setdefault(note.key, _comment(note.reason))
        elif note.to is not None and (note.fate in ("renamed", "changed") or note.reason):
            words = f"{note.key}" + (f": {note.reason}" if note.reason else "")
            told.setdefault(note.to, _comment(f"from {words}"))
    body = [f"stage: {made.stage}"]
    names = sections(config_class(made.stage))
    for key in (key for key in made.values if "." not in key):
        body += _lines(key, made.values[key], told.get(key), "")
    for section in names:
        inside = {
            k: v for k, v in made.values.items() if k.partition(".")[0] == section and "." in k
        }
        if not inside:
            continue
        body.append(f"{section}:")
        for key, value in inside.items():
            body += _lines(key.partition(".")[2], value, told.get(key), "  ")
    return "\n".join([*head, *body]) + "\n"


@dataclass(frozen=True)
class Conversion:
    """A recipe that was written, and what is still wrong with it."""

    made: Translation
    output: Path
    problems: tuple[Problem, ...] = ()
    """What `align validate` finds."""

    def show(self, *, as_json: bool = False) -> None:
        """Print the note on every key; raises the problems, if there are any."""
        if as_json:
            print_json(
                {
                    "ok": not self.problems,
                    "tool": self.made.tool,
                    "stage": self.made.stage,
                    "output": str(self.output),
                    "notes": [asdict(note) for note in self.made.notes],
                    "problems": [str(problem) for problem in self.problems],
                }
            )
        else:
            widest = max((len(str(note.line or "")) for note in self.made.notes), default=1)
            for note in self.made.notes:
                say(f"{note.line or '':>{widest}}  {note}", results=True)
            found = f"{self.made.stage}, from {TITLES[self.made.tool]}"
            say(f"{display(self.output.absolute())}: {found}", results=True)
        if self.problems and not as_json:
            raise AlignError(*self.problems)


def convert(
    file: Path, output: Path, *, tool: str | None = None, stage: str | None = None
) -> Conversion:
    """Write the recipe `output` from another tool's `file`.

    Raises:
        AlignError: `output` is there already, or the file cannot be translated; nothing is written.
    """
    of, kind = _checked(tool, TITLES, "--from"), _checked(stage, STAGES, "--stage")
    if output.suffix not in SUFFIXES:
        fail("must end in .yaml", where=str(output), hint=f"as in --output {output.name}.yaml")
    if exists(output) or output.is_symlink():
        fail(
            "exists already, and nothing is overwritten",
            where=display(output.absolute()),
            hint="name another",
        )
    document = read(file, display(file.absolute()))
    if document.problems:
        raise AlignError(*document.problems)
    made = translate(document, file, tool=cast(Tool | None, of), stage=kind)
    _beside(made, file, output)
    text = recipe_text(made, file.name)
    result: Document = parse(text, str(output))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("x", encoding="utf-8") as handle:
            handle.write(text)
    except OSError as error:
        fail(f"cannot be written ({error.strerror})", where=str(output))
    try:
        load_stage((result, output.absolute()), ready=False)
    except AlignError as error:
        return Conversion(made, output, error.problems)
    return Conversion(made, output)


def _checked(name: str | None, known: Iterable[str], where: str) -> str | None:
    if name is not None and name not in known:
        close = nearest(name, known)
        hint = f"did you mean `{close}`?" if close else f"one of {', '.join(known)}"
        fail(f"there is no `{name}`", where=where, hint=hint)
    return name


def _beside(made: Translation, file: Path, output: Path) -> None:
    """Paths that stand beside their file, and not here, as paths from the new recipe's folder."""
    before, after = file.absolute().parent, output.absolute().parent
    if before == after:
        return

    def moved(value: Any) -> Any:
        if not isinstance(value, str) or Path(value).is_absolute() or exists(Path(value)):
            return value
        beside = before / value
        return str(beside) if value.strip() and exists(beside) else value

    for key in ("data.dataset_name", "model.model_name_or_path", "model.chat_template_path"):
        if key in made.values:
            made.values[key] = moved(made.values[key])
    for entry in made.values.get("data.datasets", ()):
        if isinstance(entry, dict):
            entry["path"] = moved(entry["path"])
