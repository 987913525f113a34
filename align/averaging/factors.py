"""Averages of LoRA adapters, from their files alone: no base is loaded.

An adapter adds s B A to a weight. The mean of such products is not the product of the mean factors
(mean(B) mean(A) mixes every B with every other A), so the factors themselves are never averaged. The
mean is exact as the product of factors put side by side (PEFT's `cat`):
w1 s1 B1 A1 + w2 s2 B2 A2 = [w1 s1 B1, w2 s2 B2] [A1; A2]. `svd` cuts it to the best product of a lower
rank (Eckart and Young, 1936), without ever making the full matrix.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from align.averaging.members import (
    ADAPTER,
    Member,
    check_finite,
    open_tensors,
    write_adapter_config,
)
from align.errors import fail
from align.models.identity import model_file

PAIRS = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}
"""End of the name of a first factor -> of its second."""

MORE_THAN_FACTORS = ("use_dora", "rank_pattern", "alpha_pattern", "target_parameters", "lora_bias")
"""Settings with which an adapter is more than `alpha / r B A` on whole layers."""


@dataclass
class Sums:
    """What is added up over the modules."""

    gram: torch.Tensor
    """Inner products of the members' deltas, (members, members)."""
    kept: float = 0.0
    """Squared norm of what a cut keeps, and of what it leaves out."""
    cut: float = 0.0
    worst: tuple[float, str] = (0.0, "")
    """Largest relative error of a module, and its name."""
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


def average_adapters(
    members: Sequence[Member], folder: Path, *, svd: bool, rank: int | None
) -> dict[str, Any]:
    """Write the mean of adapters of one base as an adapter.

    Args:
        members: plain LoRA adapters of the same modules.
        folder: the artifact folder.
        svd: cut the mean back to a rank; else the ranks add up and it is exact.
        rank: that rank; the largest of the adapters' when None.

    Returns:
        The report: `rank`, `distance` (largest ||D_i - mean|| / ||mean||), `distances`, `cosines` of the
        members' deltas, and with `svd` the relative error of the cut, in all and of the worst module.

    Raises:
        AlignError: an adapter is more than plain factors, or has other tensors than the first.
    """
    for member in members:
        _check_plain(member)
    ranks = [int(member.config["r"]) for member in members]
    if svd and rank is not None and rank > sum(ranks):
        hint = f"give at most {sum(ranks)}, or `method: cat`, which is exact"
        fail(f"is above {sum(ranks)}, the rank of the exact average", where="svd_rank", hint=hint)
    target = (rank or max(ranks)) if svd else sum(ranks)
    opened = [_open(member) for member in members]
    names = _same_names(members, opened)
    sums = Sums(torch.zeros(len(members), len(members), dtype=torch.float64))
    for name in names:
        _average(name, members, opened, sums, target if svd else None)
    save_file(sums.tensors, folder / ADAPTER, metadata={"format": "pt"})
    write_adapter_config(members[0], folder, target)
    report = _report(members, sums.gram) | {"method": "svd" if svd else "cat", "rank": target}
    if svd:
        whole = sums.kept + sums.cut
        report["svd_error"] = math.sqrt(sums.cut / whole) if whole else 0.0
        report["worst_module"] = {"name": sums.worst[1], "error": sums.worst[0]}
    return report


def deltas_apart(members: Sequence[Member]) -> dict[str, Any]:
    """Distances and cosines of plain adapters; nothing for others."""
    if any(_more(member) for member in members):
        return {}
    opened = [_open(member) for member in members]
    gram = torch.zeros(len(members), len(members), dtype=torch.float64)
    for name in _same_names(members, opened):
        if (pair := _second(name)) is not None:
            gram += _gram(*_factors(name, pair, members, opened))
    return _report(members, gram)


def _more(member: Member) -> list[str]:
    return [key for key in MORE_THAN_FACTORS if member.config.get(key)]


def _check_plain(member: Member) -> None:
    if more := _more(member):
        fail(
            f"is more than factors on whole layers (`{more[0]}`), which no other adapter can average",
            where=f"models.{member.name}: {member.path}",
            hint="set `method: merge`, which averages the merged weights",
        )


def _open(member: Member) -> Any:
    file = model_file(member.path, ADAPTER, member.artifact.base_revision)
    assert file is not None, "looked at before"
    return open_tensors(file, member)


def _same_names(members: Sequence[Member], opened: Sequence[Any]) -> list[str]:
    """The first adapter's tensors, in order; the others must have the same, in the same shapes but for the rank."""
    first = {name: _outer_shape(opened[0], name) for name in sorted(opened[0].keys())}
    for member, other in zip(members[1:], opened[1:], strict=True):
        its = {name: _outer_shape(other, name) for name in list(other.keys())}
        different = [
            name for name in sorted(first.keys() | its.keys()) if first.get(name) != its.get(name)
        ]
        if different:
            fail(
                f"has other tensors than `{members[0].name}` ({len(different)} differ: {different[0]})",
                where=f"models.{member.name}: {member.path}",
                hint="average adapters of the same modules",
            )
    return list(first)


def _outer_shape(opened: Any, name: str) -> tuple[int, ...]:
    """The shape of a tensor without its rank."""
    shape = tuple(opened.get_slice(name).get_shape())
    if _second(name) is not None:
        return shape[1:]
    return shape[:-1] if name.endswith(tuple(PAIRS.values())) else shape


def _second(name: str) -> str | None:
    """The name of the second factor where `name` is a first one."""
    for first, second in PAIRS.items():
        if name.endswith(first):
            return name.removesuffix(first) + second
    return None


Factors = tuple[list[torch.Tensor], list[torch.Tensor]]
"""A (rank, inputs) and scaled B (outputs, rank) of every member, float64."""


def _factors(name: str, second: str, members: Sequence[Member], opened: Sequence[Any]) -> Factors:
    a = [one.get_tensor(name).double() for one in opened]
    check_finite(name, a, members)
    b = [
        one.get_tensor(second).double() * _scale(member.config)
        for member, one in zip(members, opened, strict=True)
    ]
    check_finite(second, b, members)
    return a, b


def _scale(config: dict[str, Any]) -> float:
    rank = float(config["r"])
    return float(config["lora_alpha"]) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _gram(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> torch.Tensor:
    """<B_i A_i, B_j A_j> for every pair, from the small products alone."""
    rows = [
        [((b[i].T @ b[j]) * (a[i] @ a[j].T)).sum() for j in range(len(a))] for i in range(len(a))
    ]
    return torch.stack([torch.stack(row) for row in rows])


def _average(
    name: str, members: Sequence[Member], opened: Sequence[Any], sums: Sums, rank: int | None
) -> None:
    """Put the mean of one tensor, or of one pair of factors, into `sums`."""
    shares = [member.weight for member in members]
    if name.endswith(tuple(PAIRS.values())):
        return
    second = _second(name)
    if second is None:  # a trained head or embedding row: a weight itself
        parts = [one.get_tensor(name).double() for one in opened]
        check_finite(name, parts, members)
        weighted = [share * part for share, part in zip(shares, parts, strict=True)]
        sums.tensors[name] = torch.stack(weighted).sum(0).float()
        return
    a, b = _factors(name, second, members, opened)
    sums.gram += _gram(a, b)
    joined_a = torch.cat(a, dim=0)
    joined_b = torch.cat([share * one for share, one in zip(shares, b, strict=True)], dim=1)
    if rank is not None:
        joined_a, joined_b, kept, cut = cut_to(joined_a, joined_b, rank)
        sums.kept, sums.cut = sums.kept + kept, sums.cut + cut
        error = math.sqrt(cut / (kept + cut)) if kept + cut else 0.0
        sums.worst = max(sums.worst, (error, name.rpartition(".lora_")[0]))
    sums.tensors[name] = joined_a.float().contiguous()
    sums.tensors[second] = joined_b.float().contiguous()


def cut_to(
    a: torch.Tensor, b: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """The best product of a lower rank: factors (rank, inputs) and (outputs, rank), and the squared norms kept and cut.

    B A = Q_b (R_b R_a') Q_a' with Q orthogonal, so the singular values are those of the small matrix in the middle.
    """
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = s[:rank].sqrt()
    new_a, new_b = root[:, None] * (v[:rank] @ q_a.T), (q_b @ u[:, :rank]) * root
    missing = rank - len(root)  # a layer narrower than the rank
    if missing > 0:
        new_a = torch.cat([new_a, new_a.new_zeros(missing, new_a.shape[1])])
        new_b = torch.cat([new_b, new_b.new_zeros(new_b.shape[0], missing)], dim=1)
    squares = s.square()
    return new_a, new_b, float(squares[:rank].sum()), float(squares[rank:].sum())


def _report(members: Sequence[Member], gram: torch.Tensor) -> dict[str, Any]:
    """How far the members' deltas are apart, from their inner products."""
    share = torch.tensor([member.weight for member in members], dtype=torch.float64)
    mean = float(share @ gram @ share)
    squares = (gram.diagonal() - 2 * gram @ share + mean).clamp(min=0)
    distances = (squares / mean).sqrt() if mean > 0 else torch.zeros_like(squares)
    norms = gram.diagonal().clamp(min=1e-300).sqrt()
    names = [member.name for member in members]
    cosines = gram / norms[:, None] / norms
    return {
        "members": {member.name: member.weight for member in members},
        "distance": float(distances.max()),
        "distances": dict(zip(names, distances.tolist(), strict=True)),
        "cosines": {
            f"{names[i]}, {names[j]}": float(cosines[i, j])
            for i in range(len(names))
            for j in range(i + 1, len(names))
        },
    }
