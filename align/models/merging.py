"""Full weights from an adapter, and the proof that they answer as the adapter did.

The base is loaded afresh and unquantized, the product of the factors is added in float32, and the
sum is rounded once, to the type that is saved. Merging into dequantized 4-bit weights, or in
bfloat16, gives another model; the proof reads the saved files back and measures.
"""

import json
import math
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import PeftModel
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from align.config.sections import DataSection, ModelSection
from align.durable import read_json, write_json
from align.environment import library_version
from align.errors import AlignError, fail
from align.lineage import MODEL_FILES, file_digests, file_sha256, folder_digest, folder_files
from align.models.identity import Artifact, base_weights_digest, look_at, require_adapter
from align.models.loading import (
    DTYPES,
    Model,
    check_vocabulary,
    inference_device,
    load_dequantized_policy,
    load_policy,
)
from align.models.portable import PORTABLE
from align.models.source import artifact_of, trained_by
from align.models.tokenizer import end_of_turn_ids, load_tokenizer
from align.outputs import new_folder

if TYPE_CHECKING:
    from align.data.token_rows import Kind

Dtype = Literal["float32", "bfloat16", "float16"]
Onto = Literal["trained", "original"]

REPORT = "merge_report.json"
MAX_KL = 1e-3
"""Bound on the mean KL in nats per token. Rounding to bfloat16 alone costs about 1e-5 to 1e-4."""
PROOF_TOKENS = 2048
"""Positions of the proof: their distributions are held in memory (1 GB for Llama 3's vocabulary)."""
SHARD = "5GB"

Logits = list[torch.Tensor]
"""One (tokens, vocabulary) float32 tensor per text, on the CPU."""


@dataclass(frozen=True)
class Texts:
    """What the proof is measured on."""

    ids: list[list[int]]
    facts: dict[str, Any]
    """Names (without folders), hashes, counts; rows are `given`, `held out` or `training data`."""


def merge(
    source: str,
    output: Path,
    *,
    dtype: Dtype = "bfloat16",
    data: str | None = None,
    split: str = "train",
    max_kl: float = MAX_KL,
    onto: Onto = "trained",
) -> dict[str, Any]:
    """Write the full model that an adapter makes of its base, and prove that it is that model.

    Args:
        source: a run folder of a policy, or an adapter (folder or Hub id).
        output: the folder to write; complete or absent afterwards, never overwritten.
        dtype: type of the saved weights.
        data: file, folder, card or Hub id of text for the proof; the run's own rows when unset.
        split: split of `data`.
        max_kl: highest mean KL(adapter || merged) in nats per token that is accepted.
        onto: for a run that trained on 4 or 8 bits: `trained` merges into what these bits stand for, so that the
            merged model is the trained one; `original` into the weights before quantization.

    Returns:
        The content of `merge_report.json`.

    Raises:
        AlignError: no adapter, another base than the adapter's own, no text, or a KL above `max_kl`.
    """
    with new_folder(output.expanduser().absolute(), "merging") as partial:
        partial.mkdir(parents=True)
        report = _merge_into(partial, source, dtype, data, split, max_kl, onto)
    return report


def _merge_into(
    folder: Path,
    source: str,
    dtype: Dtype,
    data: str | None,
    split: str,
    max_kl: float,
    onto: Onto,
) -> dict[str, Any]:
    path, recipe = artifact_of(source)
    recipe = trained_by(recipe)
    adapter = require_adapter(path, key="merge")
    section = _unquantized(adapter)
    tokenizer = load_tokenizer(section)
    texts = _texts(recipe, data, split, tokenizer)
    quantized = _trained_section(recipe, section)
    # A model of its own: a forward pass on a CPU changes how bitsandbytes holds 4-bit weights.
    trained = None if quantized is None else logits_of(load_policy(quantized), texts.ids)
    dequantized = quantized is not None and onto == "trained"
    with _float32_sums():
        if quantized is not None and dequantized:
            model: Any = load_dequantized_policy(quantized)
        else:
            model = load_policy(section)
        assert isinstance(model, PeftModel)
        check_vocabulary(model, tokenizer)
        model = _placed(model)
        before = logits_of(model, texts.ids)
        generation = _generation(path, tokenizer)
        _save(model, folder, dtype, generation, tokenizer)
        del model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        after = _saved_logits(folder, texts.ids)
    proof = compare(before, after)
    of_trained = None if trained is None else compare(trained, after)
    report = {
        "adapter_sha256": _adapter_digest(path),
        "base": _base_facts(section),
        "merged_in": "float32",
        "merged_into": "dequantized" if dequantized else "unquantized",
        "dtype": dtype,
        "text": texts.facts,
        **proof,
        "max_kl": max_kl,
        "trained_quantized": of_trained,
        "versions": {name: library_version(name) for name in ("torch", "transformers", "peft")},
        "files": file_digests(folder),
    }
    _refuse_above(max_kl, proof, "the adapter", source)
    if of_trained is not None and dequantized:
        hint = "save with --dtype float32"
        if quantized is not None and quantized.load_in_8bit:
            hint = "8 bits round activations too, which no merged weight can hold: train on 4 bits"
        _refuse_above(max_kl, of_trained, "the quantized model that was trained", source, hint)
    write_json(folder / REPORT, report)
    return report


def _refuse_above(
    max_kl: float,
    found: dict[str, float],
    other: str,
    source: str,
    hint: str = "save with --dtype float32",
) -> None:
    if not found["kl_mean"] <= max_kl:
        fail(
            f"the merged model differs from {other}: KL {found['kl_mean']:.2e} nats per token, "
            f"above {max_kl:g} (same best token in {found['greedy_agreement']:.1%})",
            where=source,
            hint=f"{hint}, or accept it with a higher --max-kl; nothing was kept",
        )


def _unquantized(adapter: Artifact) -> ModelSection:
    """The adapter on its own base, in float32."""
    if adapter.base is None:
        fail("names no base model in adapter_config.json", where=adapter.path)
    base = look_at(adapter.base, adapter.base_revision)
    if "quantization_config" in (base.config or {}):
        fail(
            "is stored quantized, and rounded weights cannot take an adapter up",
            where=adapter.base,
            hint="name the unquantized base as base_model_name_or_path in adapter_config.json",
        )
    return ModelSection(
        model_name_or_path=adapter.base,
        model_revision=adapter.base_revision or "main",
        adapter_name_or_path=adapter.path,
        adapter_mode="continue",
        dtype="float32",
    )


@contextmanager
def _float32_sums() -> Any:
    """Matrix products in true float32: TF32 keeps ten bits, as few as the types compared here."""
    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(kept)


# --- the text of the proof ------------------------------------------------------------------


def _section(kind: Any, values: dict[str, Any]) -> Any:
    """A section of a kept recipe; keys of the stage's own kind of section are left out."""
    known = {key: value for key, value in values.items() if key in kind.model_fields}
    try:
        return kind.model_validate(known)
    except ValidationError as error:
        fail(f"the run's recipe cannot be read: {error.errors()[0]['msg']}", where="recipe.yaml")


def _texts(
    recipe: dict[str, Any], data: str | None, split: str, tokenizer: PreTrainedTokenizerBase
) -> Texts:
    from align.data.rendering import prompt_rows, training_rows

    if data is not None:
        section = DataSection(dataset_name=data, dataset_train_split=split)
        kind = _kind_of(section)
    elif "data" in recipe:
        section = _section(DataSection, recipe["data"])
        kinds: dict[str, Kind] = {"sft": "sft", "dpo": "dpo", "reward": "dpo"}
        kind = kinds.get(str(recipe.get("stage")), "prompts")
    else:
        fail(
            "no text to compare the two models on",
            where="--data",
            hint="give a file or a data card, as in `--data rows.jsonl`",
        )
    try:
        if kind == "prompts":
            rows = (rendered := prompt_rows(section, tokenizer)).train
        else:
            rendered = training_rows(section, tokenizer, kind)
            rows = rendered.train if rendered.test is None else rendered.test
    except AlignError as error:
        if data is not None:
            raise
        found = error.problems[0]
        fail(
            f"the run's own rows, on which the proof compares both models, cannot be read: {found.message}",
            where=found.where,
            hint="name other text for the proof: --data FILE (or a data card)",
        )
    own = "training data" if rendered.test is None else "held out"
    ids = _chosen([_ids(row, kind) for row in rows])
    facts = {
        "sources": [
            {"name": Path(info.path).name, "split": info.split, "sha256": info.sha256}
            for info in rendered.sources
        ],
        "rows": "given" if data is not None else own,
        "texts": len(ids),
        "tokens": sum(map(len, ids)),
    }
    return Texts(ids, facts)


def _kind_of(section: DataSection) -> "Kind":
    from align.data.formats import recognise
    from align.data.sources import load_sources

    source, first = load_sources(section)[0], None
    kinds: tuple[Kind, ...] = ("sft", "dpo", "prompts")
    from align.data.token_rows import PURPOSES

    for kind in kinds:
        try:
            recognise(source, PURPOSES[kind])
        except AlignError as error:
            first = first or error
        else:
            return kind
    assert first is not None
    raise first


def _ids(row: dict[str, Any], kind: "Kind") -> list[int]:
    if kind == "dpo":
        return list(row["prompt_ids"]) + list(row["chosen_ids"])
    return list(row["input_ids" if kind == "sft" else "prompt_ids"])


def _chosen(rows: Sequence[list[int]]) -> list[list[int]]:
    """Rows spread evenly over the data, up to `PROOF_TOKENS` tokens; the last one may be cut."""
    mean = max(sum(map(len, rows)) / len(rows), 1)
    step = max(int(len(rows) / max(PROOF_TOKENS / mean, 1)), 1)
    chosen, left = [], PROOF_TOKENS
    for row in rows[::step]:
        if left > 0 and row:
            chosen.append(row[:left])
            left -= len(chosen[-1])
    return chosen


# --- the proof ------------------------------------------------------------------------------


def logits_of(model: Model, texts: Sequence[Sequence[int]]) -> Logits:
    """Logits at every position of every text: (tokens, vocabulary), float32, on the CPU."""
    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        return [
            model(input_ids=torch.tensor([list(ids)], device=device)).logits[0].float().cpu()
            for ids in texts
        ]


def compare(before: Logits, after: Logits) -> dict[str, float]:
    """KL(before || after) in nats per token, and the share of positions with the same best token.

    Returns:
        `kl_mean`, `kl_p99`, `kl_max`, `greedy_agreement`; infinity where a model gives no numbers.
    """
    divergences, agreed = [], []
    for first, second in zip(before, after, strict=True):
        p, q = (torch.log_softmax(logits.double(), -1) for logits in (first, second))
        divergences.append((p.exp() * (p - q)).sum(-1))
        agreed.append(first.argmax(-1) == second.argmax(-1))
    kl = torch.cat(divergences)
    if not bool(torch.isfinite(kl).all()):
        return dict.fromkeys(("kl_mean", "kl_p99", "kl_max"), math.inf) | {"greedy_agreement": 0.0}
    return {
        "kl_mean": max(float(kl.mean()), 0.0),
        "kl_p99": max(float(kl.quantile(0.99)), 0.0),
        "kl_max": max(float(kl.max()), 0.0),
        "greedy_agreement": float(torch.cat(agreed).double().mean()),
    }


def _trained_section(recipe: dict[str, Any], section: ModelSection) -> ModelSection | None:
    """The adapter on the quantized base that it was trained on; None for plain LoRA."""
    kept = recipe.get("model", {})
    if not (kept.get("load_in_4bit") or kept.get("load_in_8bit")):
        return None
    trained: ModelSection = _section(ModelSection, kept)
    update = {
        "model_name_or_path": section.model_name_or_path,
        "model_revision": section.model_revision,
        "adapter_name_or_path": section.adapter_name_or_path,
        "adapter_mode": "continue",
    }
    return trained.model_copy(update=update)


def _saved_logits(folder: Path, texts: Sequence[Sequence[int]]) -> Logits:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    return logits_of(_placed(model), texts)


def _placed(model: Any) -> Any:
    """The model in float32 on the GPU, or on the CPU where it does not fit."""
    device, size = inference_device(), 4 * sum(weight.numel() for weight in model.parameters())
    if device.type == "cuda" and size > 0.8 * torch.cuda.mem_get_info(device)[0]:
        device = torch.device("cpu")
    return model.float().eval().to(device)


# --- files ----------------------------------------------------------------------------------


def _save(
    model: PeftModel,
    folder: Path,
    dtype: Dtype,
    generation: GenerationConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        fail(
            f"cannot be merged: {error}",
            where="merge",
            hint="the adapter may hold NaN: train it again",
        )
    merged = merged.to(DTYPES[dtype])
    merged.generation_config = generation
    merged.save_pretrained(folder, safe_serialization=True, max_shard_size=SHARD)
    tokenizer.save_pretrained(folder)
    for name, change in PORTABLE.items():
        config = json.loads((folder / name).read_text(encoding="utf-8"))
        write_json(folder / name, change(config), flush=False)
    for file in folder_files(folder):
        file.chmod(0o644)


def _generation(path: str, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The adapter's own settings, or ones that end on every id that ends a turn."""
    kept = read_json(Path(path).expanduser() / "generation_config.json")
    if isinstance(kept, dict):
        return GenerationConfig.from_dict(kept)
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end_of_turn_ids(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )


def _adapter_digest(path: str) -> str | None:
    file = Path(path).expanduser() / "adapter_model.safetensors"
    return file_sha256(file) if file.is_file() else None


def _base_facts(section: ModelSection) -> dict[str, Any]:
    """The base by content where it lies here, by name where it is on the Hub: never by a path."""
    folder = Path(section.model_name_or_path).expanduser()
    if folder.is_dir():
        return {
            "sha256": folder_digest(folder, MODEL_FILES),
            "weights_sha256": base_weights_digest(section.model_name_or_path),
        }
    return {"model": section.model_name_or_path, "revision": section.model_revision}
