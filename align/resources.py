"""What ships with align (recipes, data sets) and where a path in a recipe is looked for.

In a checkout the folders `recipes/` and `datasets/` stand beside the package; an installed package
holds them in `align/_shipped/`.
"""

import itertools
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from align.config.suggest import nearest
from align.errors import AlignError, Problem, fail

_PACKAGE = Path(__file__).resolve().parent
ROOMS = ("recipes", "datasets")
SUFFIXES = (".yaml", ".yml")


def shipped(room: str) -> Path:
    """The folder `recipes` or `datasets` that came with this align."""
    checkout = _PACKAGE.parent
    if (checkout / "pyproject.toml").is_file():
        return checkout / room
    return _PACKAGE / "_shipped" / room


def exists(path: Path) -> bool:
    """Whether there is such a file or folder; False for names that no file can have."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def find_path(name: str, *, beside: Path | None = None, rooms: Sequence[str] = ()) -> Path | None:
    """The file or folder that a recipe means by `name`, absolute; None where there is none.

    Looked for in this order: the current folder; the folder of the recipe (`beside`); what ships
    with align, under `recipes/...` or `datasets/...`, and by its bare name in the `rooms` given.
    """
    given = _expanded(name)
    if not name.strip():
        return None
    candidates = [Path.cwd() / given]
    if not given.is_absolute():
        candidates += [beside / given] if beside else []
        inside = [room for room in ROOMS if len(given.parts) > 1 and given.parts[0] == room]
        candidates += [shipped(room) / given.relative_to(room) for room in inside]
        candidates += [shipped(room) / given for room in rooms]
    found = next((path for path in candidates if exists(path)), None)
    return found.absolute() if found else None


def _expanded(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # `~somebody` who has no home here
        return Path(name)


def display(path: Path) -> str:
    """A path as messages show it: short below the current folder and for what ships with align."""
    bases = [(Path.cwd(), Path()), *((shipped(room), Path(room)) for room in ROOMS)]
    for base, short in bases:
        if path.is_relative_to(base):
            return str(short / path.relative_to(base))
    return str(path)


class ShippedRecipe(NamedTuple):
    """A recipe that came with align."""

    name: str
    """What commands take: `tiny/pipeline`."""
    kind: str
    """A stage, or `pipeline`."""
    summary: str
    """The first sentence of its header comment."""
    path: Path


def shipped_recipes() -> list[ShippedRecipe]:
    """Every shipped stage recipe and pipeline, by name."""
    root = shipped("recipes")
    found = []
    for path in sorted(root.rglob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        stage = re.search(r"^stage:\s*(\w+)", text, re.M)
        is_pipeline = re.search(r"^stages:", text, re.M)
        if stage or is_pipeline:
            name = path.relative_to(root).with_suffix("").as_posix()
            kind = stage.group(1) if stage else "pipeline"
            found.append(ShippedRecipe(name, kind, _first_sentence(text), path))
    return found


def _first_sentence(text: str) -> str:
    """The first sentence of the comment at the top of a file, over as many lines as it takes."""
    comment = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    words = " ".join(line.lstrip("# ") for line in comment)
    return re.split(r"(?<=\.)\s+|\s{3,}", words, maxsplit=1)[0]


def find_recipe(name: str, *, beside: Path | None = None) -> Path:
    """The recipe file that `name` means: a path, or a shipped name (`tiny/pipeline`).

    The suffix may be left out.

    Raises:
        AlignError: there is none; the hint names the shipped recipe that is spelled most alike.
    """
    for spelling in (name, *(f"{name}{suffix}" for suffix in SUFFIXES)):
        found = find_path(spelling, beside=beside, rooms=("recipes",))
        if found and not found.is_dir():
            return found
    bare = re.sub(r"^recipes/|\.ya?ml$", "", name)
    known = [recipe.name for recipe in shipped_recipes()]
    inside = [recipe for recipe in known if recipe.startswith(f"{bare.rstrip('/')}/")]
    close = nearest(bare, known)
    hint = "`align recipes list` shows what ships with align"
    if inside:
        hint = f"one of {', '.join(inside)}"
    elif close:
        hint = f"did you mean `{close}`?"
    fail("no such recipe", where=name, hint=hint)


def recipe_files(path: Path) -> list[Path]:
    """A recipe and, for a pipeline, the stage recipes beside it that it builds on."""
    text = path.read_text(encoding="utf-8")
    names = re.findall(r"\brecipe:\s*['\"]?([^\s'\",}#]+)", text)
    beside = [path.parent / name for name in dict.fromkeys(names)]
    return [path, *(file for file in beside if file.is_file())]


def copy_recipe(name: str, destination: Path | None = None) -> list[Path]:
    """Copy a recipe (with the files a pipeline builds on) and return the copies.

    Args:
        name: a path or a shipped name.
        destination: a folder, or the new file's name; the current folder when None.

    Raises:
        AlignError: no such recipe, or a file would be overwritten; nothing was written then.
    """
    source = find_recipe(name)
    target = destination or Path()
    if target.suffix not in SUFFIXES or target.is_dir():
        target = target / source.name
    files = recipe_files(source)
    copies = [target, *(target.parent / file.relative_to(source.parent) for file in files[1:])]
    taken = [
        Problem("exists already, and nothing is overwritten", display(copy), "name another place")
        for copy in copies
        if copy.exists() or copy.is_symlink()
    ]
    if taken:
        raise AlignError(*taken)
    try:
        for file, copy in zip(files, copies, strict=True):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    except OSError as error:
        hint = "name another place: `align recipes copy NAME FOLDER`"
        fail(f"cannot be written ({error.strerror})", where=str(error.filename), hint=hint)
    return copies


def accelerate_config(name: str, *, beside: Path | None = None) -> Path | None:
    """The accelerate config that `name` means: shipped (`ddp`, `fsdp2`, `zero3`) or a file."""
    if name in accelerate_names():
        return shipped("recipes") / "accelerate" / f"{name}.yaml"
    found = find_path(name, beside=beside)
    return found if found and found.is_file() else None


def accelerate_names() -> list[str]:
    """Names of the shipped accelerate configs."""
    return sorted(path.stem for path in (shipped("recipes") / "accelerate").glob("*.yaml"))
