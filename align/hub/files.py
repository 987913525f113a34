"""Which files of a run may leave this machine, and the folder that is sent.

What is not on the list stays here: optimizer state, `training_args.bin` (a pickle that may hold a
token), data, samples, logs. Configs are copied without names of local folders.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.data.exact import strings_in
from align.durable import read_json
from align.errors import AlignError, Problem, fail
from align.hub.facts import RunFacts, is_local
from align.models.identity import IDENTITY_FILE, check_base
from align.models.portable import PORTABLE
from align.secrets import holds_secret

WEIGHTS = re.compile(r"(?:adapter_)?model(?:-\d{5}-of-\d{5})?\.safetensors(?:\.index\.json)?")
ALLOWED = frozenset(
    {
        *("config.json", "generation_config.json", "adapter_config.json", "merge_report.json"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"),
        *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
        *("README.md", "LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md"),
    }
)
KEPT_HERE = frozenset({IDENTITY_FILE, "reward_report.json", "average_report.json"})
"""align's own notes in an artifact: what matters of them is in the card."""
PATH_KEYS = ("_name_or_path", "name_or_path", "tokenizer_file")
"""Keys of saved configs that only say where a file lay."""
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "USE_POLICY.md")


@dataclass(frozen=True)
class Base:
    """The base model by the name that everybody can load."""

    id: str
    revision: str | None


def is_weights(name: str) -> bool:
    """Whether a file of a repository holds weights, or says which files do."""
    return WEIGHTS.fullmatch(name) is not None or name == "adapter_config.json"


def check_allowed(folder: Path) -> None:
    """Refuse a folder with anything in it that has no place in a model repository.

    Raises:
        AlignError: every such file, at once.
    """
    problems = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or path.is_dir():
            what = "is a link" if path.is_symlink() else "is a folder"
            problems.append(Problem(f"{what}, and a model has files only", str(path)))
        elif not (name in ALLOWED or name in KEPT_HERE or WEIGHTS.fullmatch(name)):
            problems.append(Problem("is no file of a model, and is not uploaded", str(path)))
        elif WEIGHTS.fullmatch(name) and name.endswith(".safetensors"):
            problems += _check_safetensors(path)
    if problems:
        last = Problem(problems[-1].message, problems[-1].where, "move them out of the folder")
        raise AlignError(*problems[:-1], last)


def _check_safetensors(path: Path) -> Iterator[Problem]:
    """A problem where a file is no safetensors, whatever its name says."""
    with path.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        try:
            if not 0 < length <= path.stat().st_size - 8:
                raise ValueError("no header")
            json.loads(handle.read(length))
        except ValueError:
            yield Problem("is no safetensors file", str(path))


def public_base(run: RunFacts, base_model_id: str | None, *, adapter: bool) -> Base | None:
    """The base as others can load it; None for full weights whose base has no name on the Hub.

    Args:
        run: the run.
        base_model_id: `ORG/NAME` or `ORG/NAME@REVISION`, as the user gives it.
        adapter: an adapter is sent, which is worth nothing without its base.

    Raises:
        AlignError: the adapter of a local folder without `base_model_id`, or no valid id.
    """
    if base_model_id is not None:
        name, _, revision = base_model_id.partition("@")
        _check_id(name, "--base-model-id")
        return Base(name, revision or None)
    if run.base is not None and not is_local(run.base):
        _check_id(run.base, "adapter_config.json:", owner=False)
        return Base(run.base, run.base_revision)
    if not adapter:
        named = [name for name in run.roots if not is_local(name)]
        for name in named[:1]:
            _check_id(name, "recipe.yaml:", owner=False)
        return Base(named[0], None) if named else None
    if run.base is not None:
        fail(
            f"the adapter's base is a folder of this machine ({run.base})",
            where=str(run.artifact / "adapter_config.json"),
            hint="say where others find it: --base-model-id ORG/NAME (if an earlier stage made it, "
            "push that run first), or push full weights with --merged",
        )
    return None


def _check_id(name: str, where: str, *, owner: bool = True) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        fail(f"is no id of the Hub: {str(error).splitlines()[0]}", where=f"{where} {name}")
    if owner and "/" not in name:
        fail("names no owner", where=f"{where} {name}", hint="as in `my-org/my-model`")


def check_repo_id(name: str) -> None:
    """Refuse what is no `ORG/NAME`."""
    _check_id(name, "--repo-id")


def check_own_base(run: RunFacts) -> None:
    """Refuse an adapter whose local base is not the one it was trained on any more."""
    if run.base is not None and is_local(run.base) and (Path(run.base) / "config.json").is_file():
        check_base(str(run.artifact), run.base, read_json(Path(run.base) / "config.json") or {})


def fill(
    folder: Path, model: Path, base: Base | None, run: RunFacts, extra: Mapping[str, str]
) -> None:
    """Put what will be sent into an empty folder: weights as links, configs without local names.

    Args:
        folder: an empty folder.
        model: where the weights lie (the artifact, or merged weights).
        base: written into adapter_config.json.
        run: the run.
        extra: file name -> text: card, notice.
    """
    for path in sorted(model.iterdir()):
        if path.name in KEPT_HERE or path.name in extra:
            continue
        if path.suffix == ".json" and path.name != "tokenizer.json":
            kept = _without_paths(path, base)
            (folder / path.name).write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
        else:
            _link(path, folder / path.name)
    for name, text in extra.items():
        (folder / name).write_text(text, encoding="utf-8")
    check_private(folder, run)


def _without_paths(file: Path, base: Base | None) -> Any:
    config = json.loads(file.read_text(encoding="utf-8"))
    for key in PATH_KEYS:
        config.pop(key, None)
    if file.name in PORTABLE:
        config = PORTABLE[file.name](config)
    if file.name == "adapter_config.json":
        assert base is not None
        config |= {"base_model_name_or_path": base.id, "revision": base.revision}
    return config


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def licence_files(run: RunFacts) -> dict[str, str]:
    """The licence texts that lie in the base's folder, to be passed on with the weights."""
    places = [Path(name) for name in (run.base, *run.roots) if name and is_local(name)]
    return {
        name: (place / name).read_text(encoding="utf-8", errors="replace")
        for place in reversed(places)
        for name in LICENCE_FILES
        if (place / name).is_file()
    }


def check_private(folder: Path, run: RunFacts) -> None:
    """The last look: no access token and no path of this machine in any text that is sent.

    Raises:
        AlignError: every file that has one; the token itself is not shown.
    """
    problems = []
    places = {f"{place}/" for place in (run.folder.parent, Path.home()) if place != Path("/")}
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors":
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        if holds_secret(text):
            problems.append(Problem("holds what looks like an access token", file.name))
        written = strings_in(json.loads(text)) if file.suffix == ".json" else [text]
        if file.name == "tokenizer.json":
            written = []
        local = [place for place in sorted(places) for value in written if place in value]
        if local:
            hint = "leave it out; for sample answers: --samples 0"
            problems.append(
                Problem(f"names a folder of this machine ({local[0]})", file.name, hint)
            )
    if problems:
        raise AlignError(*problems)
