"""Who is averaged, with which weight, and whether they belong together."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from align.config.sections import ModelSection
from align.durable import read_json, write_json
from align.errors import fail
from align.lineage import KEPT
from align.models.identity import (
    IDENTITY_FILE,
    Artifact,
    base_identity,
    check_base,
    look_at,
    model_file,
)
from align.models.tokenizer import load_tokenizer
from align.stages.average import AverageConfig
from align.training.checkpoints import CHECKPOINT

SINGLE, ADAPTER = "model.safetensors", "adapter_model.safetensors"

KINDS = {
    "policy": "a full model",
    "adapter": "an adapter",
    "reward": "a reward model",
    "reward_adapter": "a reward model's adapter",
}


@dataclass(frozen=True)
class Member:
    """One model of an average."""

    name: str
    weight: float
    """Share of the average; all add up to 1."""
    artifact: Artifact
    home: str
    """Folder or Hub id that holds its tokenizer and generation settings."""

    @property
    def path(self) -> str:
        return self.artifact.path

    @property
    def config(self) -> dict[str, Any]:
        """adapter_config.json of an adapter, else config.json."""
        return self.artifact.config or {}


def find_members(config: AverageConfig) -> list[Member]:
    """The models of a recipe, or their kept checkpoints, checked against each other.

    Raises:
        AlignError: fewer than two, another kind, base, shape or tokenizer.
    """
    found: list[tuple[str, float, str, str]] = []
    for name, path in config.models.items():
        weight = config.weights.get(name, 1.0)
        if config.checkpoints is None:
            found.append((name, weight, path, path))
            continue
        kept = _kept(name, path, config.checkpoints)
        found += [(f"{name}/{one.name}", weight / len(kept), str(one), path) for one in kept]
    total = sum(weight for _, weight, _, _ in found)
    members = [
        Member(name, weight / total, look_at(path), home) for name, weight, path, home in found
    ]
    for member in members[1:]:
        _same_kind(members[0], member)
        if member.artifact.base is None:
            _same_shape(members[0], member)
        else:
            _same_base(members[0], member)
    _same_tokenizer(members)
    return members


def _kept(name: str, path: str, number: int) -> list[Path]:
    """The newest kept checkpoints of the run whose artifact is at `path`, the newest last."""
    folder = Path(path).expanduser()
    home = folder.parent if folder.name == "artifact" else folder
    found = [one for one in (home / KEPT).glob("*") if CHECKPOINT.fullmatch(one.name)]
    found.sort(key=lambda one: int(one.name.partition("-")[2]))
    if len(found) < number:
        fail(
            f"keeps {len(found)} checkpoints, and {number} are asked for",
            where=f"models.{name}: {path}",
            hint=f"train it with `trainer.keep_checkpoints: {number}` and a smaller `save_steps`",
        )
    return found[-number:]


def _differ(first: Member, other: Member, what: str, hint: str) -> None:
    fail(
        f"cannot be averaged with `{first.name}`: {what}",
        where=f"models.{other.name}: {other.path}",
        hint=hint,
    )


def _same_kind(first: Member, other: Member) -> None:
    if first.artifact.kind != other.artifact.kind:
        one, two = KINDS[other.artifact.kind], KINDS[first.artifact.kind]
        hint = "average models of one kind (`align merge` makes a full model of an adapter)"
        _differ(first, other, f"it is {one}, and that is {two}", hint)


def _same_shape(first: Member, other: Member) -> None:
    one, two = base_identity(first.config), base_identity(other.config)
    different = [key for key in one.keys() | two.keys() if one.get(key) != two.get(key)]
    if different:
        key = sorted(different)[0]
        _differ(
            first,
            other,
            f"{key} is {two.get(key)}, and {one.get(key)} there",
            "average models of one architecture",
        )


def _same_base(first: Member, other: Member) -> None:
    """Adapters have to sit on the same weights, and on the same modules of them."""
    for member in (first, other):
        base = str(member.artifact.base)
        if Path(base).expanduser().is_dir():
            check_base(member.path, base, look_at(base).config or {})
    one, two = (_base_of(member) for member in (first, other))
    if one != two:
        _differ(
            first,
            other,
            f"its base is {two[0]}, and {one[0]} there",
            "average adapters of one base",
        )
    for key in ("target_modules", "trainable_token_indices", "modules_to_save", "task_type"):
        mine, its = (member.config.get(key) for member in (first, other))
        if key != "trainable_token_indices":  # trained rows lie in the order of their indices
            mine, its = _plain(mine), _plain(its)
        if mine != its:
            hint = "train them with the same `lora` keys, or set `method: merge`"
            _differ(first, other, f"`{key}` is {its}, and {mine} there", hint)


def _base_of(member: Member) -> tuple[str, str | None]:
    """The base by its weights' hash where the adapter names it, else by name and revision."""
    kept = read_json(Path(member.path).expanduser() / IDENTITY_FILE)
    if isinstance(kept, dict) and kept.get("weights_sha256"):
        return str(kept["weights_sha256"])[:12], None
    return str(member.artifact.base), member.artifact.base_revision or "main"


def _plain(value: Any) -> Any:
    return sorted(set(map(str, value))) if isinstance(value, list) else value


def _same_tokenizer(members: list[Member]) -> None:
    first, *others = [
        (member, load_tokenizer(ModelSection(model_name_or_path=member.home))) for member in members
    ]
    for member, tokenizer in others:
        if tokenizer.get_vocab() != first[1].get_vocab():
            _differ(
                first[0],
                member,
                "its tokenizer has another vocabulary",
                "average models of one tokenizer",
            )
        if tokenizer.chat_template != first[1].chat_template:
            hint = "give both the same chat template and train the one again"
            _differ(first[0], member, "it has another chat template", hint)


def open_tensors(file: Path, member: Member) -> Any:
    """A safetensors file of a member, open for reading; AlignError where it is none."""
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        fail(
            f"cannot be read as safetensors ({error})",
            where=f"models.{member.name}: {file}",
            hint="copy the folder again: the file is damaged",
        )


def check_finite(name: str, parts: Sequence[torch.Tensor], members: Sequence[Member]) -> None:
    """Refuse a member whose tensor `name` holds NaN or infinity: the mean would hold it too."""
    for member, part in zip(members, parts, strict=True):
        if part.is_floating_point() and not bool(torch.isfinite(part).all()):
            fail(
                f"holds NaN or infinity in `{name}`",
                where=f"models.{member.name}: {member.path}",
                hint="leave it out, and look at the log of its training",
            )


def bring_along(member: Member, folder: Path) -> None:
    """Put the first member's tokenizer and generation settings beside the averaged weights."""
    load_tokenizer(ModelSection(model_name_or_path=member.home)).save_pretrained(folder)
    settings = model_file(member.home, "generation_config.json", member.artifact.base_revision)
    if settings is not None:
        shutil.copyfile(settings, folder / "generation_config.json")


def write_model_config(config: dict[str, Any], folder: Path, dtype: str) -> None:
    """config.json of averaged full weights."""
    kept = {
        key: value
        for key, value in config.items()
        if key not in ("_name_or_path", "torch_dtype", "auto_map")
    }
    write_json(folder / "config.json", kept | {"dtype": dtype}, flush=False)


def write_adapter_config(member: Member, folder: Path, rank: int) -> None:
    """adapter_config.json of an averaged adapter, whose factors are scaled already, and its base's identity."""
    own = {"r": rank, "lora_alpha": rank, "use_rslora": False, "inference_mode": True}
    text = json.dumps(member.config | own, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    identity = Path(member.path).expanduser() / IDENTITY_FILE
    if identity.is_file():
        shutil.copyfile(identity, folder / IDENTITY_FILE)
