"""Averages of full weights: file by file for full models, and of merged models for adapters."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from align.averaging.factors import deltas_apart
from align.averaging.members import (
    SINGLE,
    Member,
    check_finite,
    open_tensors,
    write_model_config,
)
from align.config.sections import ModelSection
from align.durable import write_json
from align.errors import fail
from align.models.identity import look_at, model_file
from align.models.loading import DTYPES, load_policy, load_reward_model
from align.models.source import artifact_of, trained_by

INDEX = f"{SINGLE}.index.json"


def average_models(
    members: Sequence[Member], folder: Path, dtype: str, max_distance: float
) -> dict[str, Any]:
    """Write the mean of full models, in the files of the first one; one file at a time is in memory.

    Sums are float32, rounded once to the type that is saved. Tensors of whole numbers must be equal.

    Returns:
        The report: `distance`, the largest ||W_i - mean|| / ||mean|| over all weights, and `distances`.

    Raises:
        AlignError: other tensors or shapes than the first, or models further apart than `max_distance`.
    """
    places = [_places(member) for member in members]
    _same_tensors(members, places)
    wanted = DTYPES.get(dtype)
    squares, whole, size = [0.0] * len(members), 0.0, 0
    for file in dict.fromkeys(places[0].values()):
        tensors = {}
        for name in [name for name, at in places[0].items() if at == file]:
            parts = [
                _read(place[name], name, member)
                for place, member in zip(places, members, strict=True)
            ]
            check_finite(name, parts, members)
            mean = _mean(members, parts, name)
            tensors[name] = (
                mean.to(wanted or parts[0].dtype).contiguous() if mean.is_floating_point() else mean
            )
            size += tensors[name].nbytes
            if mean.is_floating_point():
                whole += float(mean.double().square().sum())
                for at, part in enumerate(parts):
                    squares[at] += float((part.float() - mean).double().square().sum())
        save_file(tensors, folder / file.name, metadata={"format": "pt"})
    distances = {
        member.name: math.sqrt(square / whole) if whole else 0.0
        for member, square in zip(members, squares, strict=True)
    }
    _refuse_strangers(distances, max_distance)
    if len({*places[0].values()}) > 1:
        names = {name: file.name for name, file in places[0].items()}
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": names})
    own = str(members[0].config.get("dtype") or members[0].config.get("torch_dtype") or "float32")
    write_model_config(members[0].config, folder, own if wanted is None else dtype)
    return {
        "members": {member.name: member.weight for member in members},
        "method": "mean of full weights",
        "distance": max(distances.values()),
        "distances": distances,
    }


def _refuse_strangers(distances: dict[str, float], bound: float) -> None:
    name = max(distances, key=lambda one: distances[one])
    if not distances[name] <= bound:
        fail(
            f"is {distances[name]:.2f} from the mean, relative to its norm, above {bound:g}: "
            "these models seem to have no base in common, and their mean would be none of them",
            where=f"models.{name}",
            hint="average fine-tunes of one base, or accept it with a higher `max_distance`",
        )


def _places(member: Member) -> dict[str, Path]:
    """Name of a tensor -> the file that holds it, in the order of the files."""
    revision = member.artifact.base_revision
    single = model_file(member.path, SINGLE, revision)
    if single is not None:
        files = [single]
    else:
        index = model_file(member.path, INDEX, revision)
        if index is None:
            fail(
                "holds no safetensors weights, and align reads no pickle files",
                where=f"models.{member.name}: {member.path}",
                hint="convert the checkpoint once with save_pretrained(safe_serialization=True)",
            )
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        found = [model_file(member.path, name, revision) for name in sorted(set(names))]
        files = [file for file in found if file is not None]
    places: dict[str, Path] = {}
    for file in files:
        with open_tensors(file, member) as opened:
            places |= dict.fromkeys(opened.keys(), file)
    return places


def _read(file: Path, name: str, member: Member) -> torch.Tensor:
    with open_tensors(file, member) as opened:
        tensor: torch.Tensor = opened.get_tensor(name)
    return tensor


def _same_tensors(members: Sequence[Member], places: Sequence[dict[str, Path]]) -> None:
    for member, place in zip(members[1:], places[1:], strict=True):
        different = sorted(places[0].keys() ^ place.keys())
        if different:
            fail(
                f"has other tensors than `{members[0].name}` ({len(different)} differ: {different[0]})",
                where=f"models.{member.name}: {member.path}",
                hint="average models of one architecture",
            )


def _mean(members: Sequence[Member], parts: Sequence[torch.Tensor], name: str) -> torch.Tensor:
    for member, part in zip(members, parts, strict=True):
        if part.shape != parts[0].shape:
            fail(
                f"`{name}` has the shape {list(part.shape)}, and {list(parts[0].shape)} in `{members[0].name}`",
                where=f"models.{member.name}: {member.path}",
                hint="average models of one architecture",
            )
        if not part.is_floating_point() and not torch.equal(part, parts[0]):
            fail(f"`{name}` holds whole numbers, which differ", where=f"models.{member.name}")
    if not parts[0].is_floating_point():
        return parts[0]
    mean = torch.zeros(parts[0].shape)
    for member, part in zip(members, parts, strict=True):
        mean.add_(part.float(), alpha=member.weight)
    return mean


def average_merged(members: Sequence[Member], folder: Path, dtype: str) -> dict[str, Any]:
    """Write the mean of what adapters make of their base, as a full model; two models are in memory.

    Exact for every kind of adapter: each is merged in float32, and the mean is rounded once.

    Raises:
        AlignError: an adapter was trained on a quantized base.
    """
    for member in members:
        _refuse_quantized(member)
    mean: dict[str, torch.Tensor] = {}
    model: Any = None
    for member in members:
        model = _merged(member)
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                mean[name] = tensor
            elif name in mean:
                mean[name].add_(tensor, alpha=member.weight)
            else:
                mean[name] = tensor * member.weight
    model.load_state_dict(mean)
    base = look_at(str(members[0].artifact.base), members[0].artifact.base_revision).config or {}
    own = str(base.get("dtype") or base.get("torch_dtype") or "float32")
    saved = own if dtype == "auto" else dtype
    model.to(DTYPES.get(saved, torch.float32)).save_pretrained(folder, safe_serialization=True)
    write_model_config(
        json.loads((folder / "config.json").read_text(encoding="utf-8")), folder, saved
    )
    apart = deltas_apart(members)
    return (
        {"members": {member.name: member.weight for member in members}}
        | apart
        | {"method": "merge"}
    )


def _refuse_quantized(member: Member) -> None:
    """The weights before quantization are other ones than those that the adapter was trained on."""
    trained_on = trained_by(artifact_of(member.home)[1]).get("model") or {}
    bits = next((key for key in ("load_in_4bit", "load_in_8bit") if trained_on.get(key)), None)
    if bits is not None:
        fail(
            f"was trained on a quantized base (`model.{bits}`), and would be merged into another one",
            where=f"models.{member.name}: {member.path}",
            hint="set `method: cat`, which is exact; `align merge` puts that average onto the base it was trained on",
        )


def _merged(member: Member) -> Any:
    """Base and adapter in float32 on the CPU, as one model."""
    section = ModelSection(
        model_name_or_path=str(member.artifact.base),
        model_revision=member.artifact.base_revision or "main",
        adapter_name_or_path=member.path,
        adapter_mode="continue",
        dtype="float32",
    )
    if member.artifact.kind == "reward_adapter":
        like = ModelSection(model_name_or_path=section.model_name_or_path, dtype="float32")
        model: Any = load_reward_model(member.path, like)[0]
    else:
        model = load_policy(section)
    return model.to("cpu").merge_and_unload(safe_merge=True)
