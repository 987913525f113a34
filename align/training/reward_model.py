"""A reward model's artifact and report: saved with its head, reloaded, re-scored, and examined."""

import gc
import json
import os
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from numpy.typing import NDArray
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, Trainer

from align.data.rendering import RenderedData
from align.errors import fail
from align.evaluation.statistics import wilson_interval
from align.generation.scoring import RewardScorer
from align.models.adapters import save_adapter
from align.models.identity import write_base_identity
from align.models.loading import load_reward_model, load_reward_start
from align.runs import RunFolder
from align.stages.reward import RewardConfig
from align.training.fitting import keep_checkpoints, merged
from align.training.sharding import gathered, is_sharded

Array = NDArray[np.float64]

REPORT_PAIRS = 2000
"""Pairs scored at most for the report."""
VERIFIED_PAIRS = 4
VERIFIED_TOKENS = 256
"""Taken from the end of each answer: a sharded model is proven on a CPU, where long ones would take hours."""
REPORT_BATCH = 64


def score_pairs(scorer: RewardScorer, pairs: Dataset, batch_size: int) -> tuple[Array, Array]:
    """Rewards of the chosen and the rejected side of every pair, each of shape (pairs,)."""
    sequences = [*pairs["chosen_ids"], *pairs["rejected_ids"]]
    rewards = np.asarray(scorer.score(sequences, batch_size=batch_size), dtype=np.float64)
    return rewards[: len(pairs)], rewards[len(pairs) :]


def save_and_verify(
    trainer: Trainer,
    folder: RunFolder,
    config: RewardConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: RenderedData,
) -> None:
    """Save the reward model, load it again, compare rewards on a few pairs, and write its report.

    A LoRA reward model whose head is not saved reloads with a random one and fails silently for
    whoever uses it next, so the stage does not end before the reloaded model agrees.

    Raises:
        AlignError: where the reloaded model scores differently.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    sharded = is_sharded(trainer)
    if not (folder.is_main or sharded):
        return
    few = rows.train.select(range(min(VERIFIED_PAIRS, len(rows.train))))
    if sharded:
        few = few.map(_ends, keep_in_memory=True)
    scorer = RewardScorer(model, tokenizer, sharded=sharded)
    before = np.concatenate(score_pairs(scorer, few, VERIFIED_PAIRS))
    # Whole weights need not fit on one GPU: what is reported of them is computed while they are in pieces.
    scored = _score_together(trainer, scorer, _reported(rows)) if sharded else None
    weights = gathered(trainer) if sharded else None
    if not folder.is_main:
        return
    keep_checkpoints(trainer, folder, config.model)
    _save(model, folder, config, weights)
    tokenizer.save_pretrained(folder.artifact)
    artifact = folder.artifact
    full_model = config.merge_adapter or not isinstance(model, PeftModel)
    del weights
    _make_room(trainer)
    if sharded:  # the other processes wait, and launchers give each one thread
        torch.set_num_threads(os.cpu_count() or 1)
    loaded, its_tokenizer = load_reward_model(
        str(artifact),
        None if full_model else config.model,
        device=torch.device("cpu") if sharded else None,
    )
    reduced = sharded and trainer.args.bf16
    if reduced:
        # As its pieces were when they were brought together; buffers (the angles of positions) stayed exact.
        for parameter in loaded.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    scorer = RewardScorer(loaded, its_tokenizer)
    after = np.concatenate(score_pairs(scorer, few, VERIFIED_PAIRS))
    # Over a quantized base adapters are bfloat16 and products are rounded, whatever the other weights are.
    full = str(model.dtype) == "torch.float32" and not getattr(model, "is_quantized", False)
    # Pieces may have been computed on GPUs, whose kernels round otherwise than those of the CPU.
    precision = 1e-4 if full and not reduced else 0.1 if reduced else 3e-2
    difference = float(np.abs(after - before).max())
    if difference > precision * max(1.0, float(np.abs(before).max())):
        fail(
            f"the saved reward model scores {2 * len(few)} answers differently when it is loaded "
            f"again (by up to {difference:.3g})",
            where=str(artifact),
            hint="the head or the adapter was not saved in full; keep the checkpoints and report it",
        )
    folder.note("reload_difference", difference)
    _report(scored or score_pairs(scorer, _reported(rows), REPORT_BATCH), folder, rows)


def _save(
    model: Any, folder: RunFolder, config: RewardConfig, weights: dict[str, torch.Tensor] | None
) -> None:
    """Write the adapter, or the whole classifier; `weights` are those of a sharded model, brought together."""
    section, artifact = config.model, folder.artifact
    base = section.model_name_or_path
    if isinstance(model, PeftModel) and not config.merge_adapter:
        revision = section.model_revision
        save_adapter(model, artifact, base=base, revision=revision, weights=weights)
        write_base_identity(artifact, base, model.config.to_dict())
        return
    if isinstance(model, PeftModel):
        start = partial(load_reward_start, train_base=False)
        model, weights = merged(model, start, section, weights), None
    model.save_pretrained(artifact, safe_serialization=True, state_dict=weights)


def _score_together(trainer: Trainer, scorer: RewardScorer, pairs: Dataset) -> tuple[Array, Array]:
    """As `score_pairs`: every process scores its share of the pairs, and gets all rewards."""
    places = list(range(len(pairs)))
    with trainer.accelerator.split_between_processes(places, apply_padding=True) as own:
        found = score_pairs(scorer, pairs.select(own), REPORT_BATCH)
    shares = gather_object([(place, *pair) for place, *pair in zip(own, *found, strict=True)])
    rewards = {place: (chosen, rejected) for place, chosen, rejected in shares}
    chosen, rejected = np.array([rewards[place] for place in places]).T
    return chosen, rejected


def _make_room(trainer: Trainer) -> None:
    """Take optimizer and trained model off the GPU, so that the saved one fits beside nothing."""
    trainer.optimizer = None
    trainer.model.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        if not (getattr(trainer.model, "is_quantized", False) or is_sharded(trainer)):
            trainer.model.to("cpu")
        gc.collect()
        torch.cuda.empty_cache()


def _ends(row: dict[str, list[int]]) -> dict[str, list[int]]:
    return {side: row[side][-VERIFIED_TOKENS:] for side in ("chosen_ids", "rejected_ids")}


def _reported(rows: RenderedData) -> Dataset:
    pairs = rows.test if rows.test is not None else rows.train
    return pairs.select(range(min(REPORT_PAIRS, len(pairs))))


def _report(rewards: tuple[Array, Array], folder: RunFolder, rows: RenderedData) -> None:
    """Write `reward_report.json`: accuracy, by margin, against length, and calibration."""
    pairs = _reported(rows)
    chosen, rejected = rewards
    lengths = np.array(
        [len(row["chosen_ids"]) - len(row["rejected_ids"]) for row in pairs], dtype=np.float64
    )
    margins = np.array(pairs["margin"]) if "margin" in pairs.column_names else None
    found = examine(chosen, rejected, lengths, margins)
    found["pairs_from"] = "held-out split" if rows.test is not None else "training split"
    path = folder.artifact / "reward_report.json"
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    folder.note("accuracy", found["accuracy"]["value"])
    folder.note("accuracy_from", found["pairs_from"])


def examine(
    chosen: Array, rejected: Array, length_differences: Array, margins: Array | None
) -> dict[str, Any]:
    """What a reward model got right, and on what it leans.

    Args:
        chosen, rejected: rewards, shape (pairs,).
        length_differences: tokens of chosen minus tokens of rejected, shape (pairs,).
        margins: how much better the chosen answer was said to be, shape (pairs,), or None.

    Returns:
        `accuracy` with a Wilson interval; `by_margin` (quartiles of the margin, as Table 8 of
        Llama 2); `length`: the correlation of reward difference and length difference, and the
        accuracy where the longer or the shorter answer was chosen; `calibration`: ten bins of
        sigmoid(|difference|) against the share of right orders, with the expected error.
    """
    difference = chosen - rejected
    right = difference > 0
    return {
        "pairs": len(right),
        "accuracy": _share(right),
        "mean_reward": float(np.mean([chosen, rejected])),
        "reward_deviation": float(np.std([chosen, rejected])),
        "by_margin": None if margins is None else _by_margin(right, margins),
        "length": {
            "correlation": _correlation(difference, length_differences),
            "longer_chosen": _share(right[length_differences > 0]),
            "shorter_chosen": _share(right[length_differences < 0]),
        },
        "calibration": _calibration(difference, right),
    }


def _share(right: NDArray[np.bool_]) -> dict[str, Any]:
    if not len(right):
        return {"value": None, "low": None, "high": None, "pairs": 0}
    low, high = wilson_interval(int(right.sum()), len(right))
    return {"value": float(right.mean()), "low": low, "high": high, "pairs": len(right)}


def _by_margin(right: NDArray[np.bool_], margins: Array) -> list[dict[str, Any]]:
    edges = np.unique(np.quantile(margins, [0, 0.25, 0.5, 0.75, 1]))
    places = np.clip(np.searchsorted(edges, margins, side="right") - 1, 0, max(len(edges) - 2, 0))
    buckets = []
    for place in np.unique(places):
        inside = places == place
        span = {"from": float(margins[inside].min()), "to": float(margins[inside].max())}
        buckets.append(span | _share(right[inside]))
    return buckets


def _correlation(first: Array, second: Array) -> float | None:
    if len(first) < 2 or first.std() == 0 or second.std() == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def _calibration(difference: Array, right: NDArray[np.bool_]) -> dict[str, Any]:
    confidence = 1 / (1 + np.exp(-np.abs(difference)))
    places = np.minimum(((confidence - 0.5) * 20).astype(int), 9)
    bins, error = [], 0.0
    for place in np.unique(places):
        inside = places == place
        said, found = float(confidence[inside].mean()), float(right[inside].mean())
        error += abs(said - found) * float(inside.mean())
        bins.append({"confidence": said, "accuracy": found, "pairs": int(inside.sum())})
    return {"bins": bins, "expected_error": error}
