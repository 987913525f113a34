"""What lies at a run folder's place, compared with what a config asks for. Writes nothing."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from align.durable import read_json
from align.errors import AlignError, Problem, fail
from align.lineage import Identity, differences
from align.resources import find_path


@dataclass(frozen=True)
class Standing:
    """What lies at a run folder's place, compared with what a config asks for."""

    state: Literal["absent", "unchanged", "changed", "damaged", "foreign"]
    reasons: tuple[str, ...] = ()
    """What differs (changed) or what is missing (damaged)."""


def standing(output: Path, identity: Identity) -> Standing:
    """Compare the run at `output` with the identity of a config. Writes nothing."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return Standing("absent")
    lineage = read_json(output / "lineage.json")
    if not isinstance(lineage, dict) or "outputs" not in lineage:
        return Standing("foreign")
    missing = tuple(
        name
        for name, facts in lineage["outputs"]["files"].items()
        if _size(output / "artifact" / name) != facts["size"]
    )
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        reason = f"artifact/{missing[0]} is missing or has another size{more}"
        return Standing("damaged", (reason,))
    if lineage.get("fingerprint") == identity.fingerprint:
        return Standing("unchanged")
    return Standing("changed", tuple(differences(lineage.get("parts", {}), identity.parts)))


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def refuse(output: Path, found: Standing) -> NoReturn:
    """Say why a run folder cannot be used for this run, and the ways out."""
    key = f"output_dir: {output}"
    away = f"mv {output} {output}.old"
    if found.state == "foreign":
        fail(
            "holds files that are no run of align",
            where=key,
            hint=f"choose another output_dir, or move them away: {away}",
        )
    if found.state == "damaged":
        fail(
            f"holds a damaged run: {found.reasons[0]}",
            where=key,
            hint=f"move it away and run again: {away}",
        )
    shown = "; ".join(found.reasons[:4]) + (" ..." if len(found.reasons) > 4 else "")
    fail(
        f"already holds another run ({shown})",
        where=key,
        hint=f"choose another output_dir, or move that run away: {away}",
    )


def check_inputs(identity: Identity) -> None:
    """Refuse inputs that look like files or folders of this machine and are not there."""
    problems = [
        Problem("no such file or folder", f"{key}: {facts['path']}", "check the path")
        for key, facts in identity.inputs.items()
        if "sha256" not in facts and looks_local(facts["path"])
    ]
    if problems:
        raise AlignError(*problems)


def looks_local(value: str) -> bool:
    """Whether a name that could be a path or a Hub id can only be a path, and nothing is there."""
    only_a_path = value.startswith((".", "/", "~")) or value.count("/") > 1
    return only_a_path and find_path(value, rooms=("datasets",)) is None
