"""What a folder or Hub id holds, and whether an adapter belongs to the base it meets.

Light: reads JSON files only, so that a wrong folder is refused before any weight is loaded.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from align.errors import fail

Kind = Literal["policy", "reward", "adapter", "reward_adapter"]


@dataclass(frozen=True)
class Artifact:
    """A model folder or Hub id, as its own files describe it."""

    path: str
    kind: Kind
    base: str | None = None
    """Base model of an adapter."""
    base_revision: str | None = None
    config: dict[str, Any] | None = None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fail(
            f"cannot be read as JSON ({error})",
            where=str(path),
            hint="copy the folder again: the file is damaged",
        )
    if not isinstance(value, dict):
        fail("does not hold a JSON object", where=str(path))
    return value


def model_file(
    path: str, name: str, revision: str | None, *, only_here: bool = False
) -> Path | None:
    """The file `name` of a local folder or a Hub repository; None where there is no such file.

    With `only_here` the Hub is not asked: what was downloaded before counts.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    if folder.exists():
        fail(
            "is a file; a model is a folder or a Hub id",
            where=path,
            hint="name the folder that holds config.json or adapter_config.json",
        )
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        fail("no such folder", where=path, hint="check the path; a Hub id has the form `org/name`")
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(
            path,
            name,
            revision=revision or "main",
            local_files_only=only_here,
            _raise_exceptions_for_missing_entries=False,
        )
    except OSError as error:
        fail(
            f"is no local folder, and the Hub does not give it: {str(error).splitlines()[0]}",
            where=path,
            hint="check the name; for gated models (Llama) accept the licence and `hf auth login`",
        )
    return Path(found) if found else None


def _hub_is_silent(path: str, name: str, revision: str | None) -> bool:
    """Whether the Hub was asked for a file that is not here and said neither yes nor no."""
    if Path(path).expanduser().exists():
        return False
    from huggingface_hub import try_to_load_from_cache

    return try_to_load_from_cache(path, name, revision=revision or "main") is None


def artifact_hint(path: str) -> str | None:
    """The way out for a run folder that is named where the artifact in it is meant."""
    inside = Path(path).expanduser() / "artifact"
    return f"did you mean `{Path(path) / 'artifact'}`?" if inside.is_dir() else None


def look_at(path: str, revision: str | None = None) -> Artifact:
    """Say what `path` holds. Raises AlignError where it is no model and no adapter."""
    adapter_file = model_file(path, "adapter_config.json", revision)
    if adapter_file is not None:
        if model_file(path, "adapter_model.safetensors", revision) is None:
            fail(
                "holds no adapter_model.safetensors, and align reads no pickle files",
                where=path,
                hint="save the adapter again with safe_serialization=True",
            )
        adapter = _read_json(adapter_file)
        kind: Kind = "reward_adapter" if adapter.get("task_type") == "SEQ_CLS" else "adapter"
        return Artifact(
            path, kind, adapter.get("base_model_name_or_path"), adapter.get("revision"), adapter
        )
    silent = _hub_is_silent(path, "adapter_config.json", revision)
    config_file = model_file(path, "config.json", revision, only_here=silent)
    if config_file is None and silent:
        fail(
            "is no folder here, and the Hub cannot be asked: no connection, or HF_HUB_OFFLINE is set",
            where=path,
            hint="check the spelling of a folder; a Hub id needs a connection, or `hf download` beforehand",
        )
    if config_file is None:
        fail(
            "holds neither config.json nor adapter_config.json",
            where=path,
            hint=artifact_hint(path) or "name a folder written by save_pretrained, or a Hub id",
        )
    config = _read_json(config_file)
    if "auto_map" in config and not _is_native(config):
        fail(
            "needs code from the repository (config.json has `auto_map`), and align runs none",
            where=path,
            hint="use a checkpoint in an architecture that transformers itself has",
        )
    names = config.get("architectures") or []
    reward = any(name.endswith("ForSequenceClassification") for name in names)
    return Artifact(path, "reward" if reward else "policy", config=config)


def _is_native(config: dict[str, Any]) -> bool:
    """Whether transformers has the architecture itself, so that a repository's own code (Phi-3, DeepSeek-V3) is not
    needed; nothing but the library's classes is loaded then."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return config.get("model_type") in CONFIG_MAPPING_NAMES


def require_full_model(path: str, revision: str | None = None, *, key: str) -> Artifact:
    """The artifact at `path` if it is a full language model; AlignError with the way out if not."""
    found = look_at(path, revision)
    if found.kind == "adapter":
        fail(
            f"is a LoRA adapter (of {found.base}), but a full model is needed",
            where=f"{key}: {path}",
            hint=f"set adapter_name_or_path: {path} and model_name_or_path: {found.base}",
        )
    if found.kind in ("reward", "reward_adapter"):
        fail(
            "is a reward model, but a policy (a language model) is needed",
            where=f"{key}: {path}",
            hint="name the base or SFT model; a reward model belongs under `reward_model`",
        )
    return found


def require_reward_model(path: str) -> Artifact:
    """The artifact at `path` if it is a trained reward model; AlignError with the way out if not."""
    found = look_at(path)
    if found.kind in ("policy", "adapter"):
        fail(
            "is a policy (a language model), but a reward model is needed",
            where=f"reward_model: {path}",
            hint="train one with `align reward`, or name a sequence classifier with one label",
        )
    return found


def require_adapter(path: str, *, key: str) -> Artifact:
    """The artifact at `path` if it is a policy's adapter; AlignError with the way out if not."""
    found = look_at(path)
    if found.kind in ("policy", "reward"):
        fail(
            "is a full model, but an adapter is needed",
            where=f"{key}: {path}",
            hint=f"set model_name_or_path: {path} and leave adapter_name_or_path out",
        )
    if found.kind == "reward_adapter":
        fail(
            "is a reward model's adapter, but a policy's is needed",
            where=f"{key}: {path}",
            hint="name an adapter that `align sft` or `align dpo` wrote",
        )
    return found


SHAPE_KEYS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "tie_word_embeddings",
)


def base_identity(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a model's config that an adapter's shapes depend on."""
    return {key: config.get(key) for key in SHAPE_KEYS if key in config}


def base_weights_digest(path: str) -> str | None:
    """sha256 over the safetensors of a local model folder; None for a Hub id."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return None
    from align.lineage import folder_digest

    return folder_digest(folder, pattern="*.safetensors")


IDENTITY_FILE = "base_identity.json"


def write_base_identity(folder: Path, base: str, config: dict[str, Any]) -> None:
    """Leave beside an adapter what its base looked like, for `check_base` to compare with."""
    identity = {
        "base_model_name_or_path": base,
        "shape": base_identity(config),
        "weights_sha256": base_weights_digest(base),
    }
    (folder / IDENTITY_FILE).write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")


def check_base(adapter: str, base: str, base_config: dict[str, Any]) -> None:
    """Refuse an adapter that was trained on another base: other shapes, or other weights.

    Adapters of other tools carry no identity file and pass; PEFT checks the shapes of these.
    """
    file = Path(adapter).expanduser() / IDENTITY_FILE
    if not file.is_file():
        return
    saved = _read_json(file)
    for key, value in saved.get("shape", {}).items():
        if base_config.get(key) != value:
            fail(
                f"was trained on a base with {key} {value}, but {base} has {base_config.get(key)}",
                where=adapter,
                hint=f"use its own base: {saved.get('base_model_name_or_path')}",
            )
    digest = saved.get("weights_sha256")
    if digest is not None and (found := base_weights_digest(base)) not in (None, digest):
        assert found is not None
        fail(
            f"was trained on other weights (sha256 {digest[:12]}) than {base} holds ({found[:12]})",
            where=adapter,
            hint=f"use its own base, {saved.get('base_model_name_or_path')}, or train it again",
        )
