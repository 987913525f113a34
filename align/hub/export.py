"""`align export`: a finished model as other programs want it, complete or absent.

Weights are merged with the proof of `align merge`; configs are written for readers of transformers
4 and 5. A GGUF file is written by llama.cpp's own converter where the user has it: the `gguf`
package writes the container, but what belongs into it (tensor names and their order, the kind of
tokenizer) is knowledge of that converter, which changes with llama.cpp.
"""

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from align.config.sections import ModelSection
from align.durable import read_json, write_json, write_text
from align.errors import fail
from align.generation.answers import stop_ids
from align.hub.facts import is_local
from align.hub.ollama import find_pieces, modelfile
from align.lineage import file_digests, folder_files
from align.models.adapters import name_base
from align.models.identity import IDENTITY_FILE, Artifact, look_at
from align.models.loading import check_vocabulary, load_policy, policy_section
from align.models.merging import MAX_KL, REPORT, SHARD, Dtype, merge
from align.models.portable import make_portable
from align.models.source import Source, find_model
from align.models.tokenizer import end_of_turn_ids, load_tokenizer
from align.outputs import new_folder

Format = Literal["gguf", "vllm", "ollama"]

GUIDE = "EXPORT.md"
GGUF_TYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM's --max-lora-rank takes."""
NOT_IN_VLLM = ("use_dora", "modules_to_save", "trainable_token_indices", "target_parameters")
"""Parts of adapters that vLLM refuses or passes over."""


@dataclass(frozen=True)
class Export:
    """What is to be exported, and for whom."""

    source: str
    """What `find_model` takes."""
    output: Path
    format: Format
    adapter: bool = False
    """For vLLM: the adapter as it is, over its base."""
    dtype: Dtype = "bfloat16"
    data: str | None = None
    split: str = "train"
    max_kl: float = MAX_KL
    name: str | None = None
    """What the model is called by its server; the output folder's name when unset."""
    system: str | None = None
    """System text of the Modelfile; the run's own when unset, none when empty."""
    llama_cpp: Path | None = None
    """A checkout of llama.cpp (or its convert_hf_to_gguf.py) that writes the GGUF file."""
    outtype: str | None = None
    """The converter's own --outtype (`q8_0`, ...); that of the weights when unset."""


def export(asked: Export) -> dict[str, Any]:
    """Write the folder and return what was done: the commands that go on, the proof of a merge.

    Raises:
        AlignError: no policy, a place that is taken, a merge whose proof fails, or an adapter or
            chat template that the other program cannot take.
    """
    output = asked.output.expanduser().absolute()
    source = find_model(asked.source)
    section = policy_section(source.path)
    converter = _converter(asked)
    if asked.adapter and asked.format != "vllm":
        fail("only vLLM serves an adapter over its base", where="--adapter", hint="leave it out")
    with new_folder(output, "exporting") as partial:
        done = _write(asked, source, section, partial, converter)
        for file in folder_files(partial):
            file.chmod(0o644)
    return done


def _write(
    asked: Export, source: Source, section: ModelSection, folder: Path, converter: Path | None
) -> dict[str, Any]:
    name = asked.name or asked.output.expanduser().absolute().name
    done: dict[str, Any] = {"format": asked.format, "output": str(asked.output), "merge": None}
    found = look_at(source.path)
    if asked.adapter:
        rank = _adapter(source, found, folder)

        def commands(out: str, base: str) -> list[list[str]]:
            return [_adapter_command(out, name, base, found.base_revision, rank)]
    else:
        done["merge"] = _weights(asked, source, section, found, folder)
        make_portable(folder)
        if asked.format == "ollama":
            _modelfile(asked, source, folder)
        if converter is not None:
            done["gguf"] = _convert(asked, folder, converter, name)

        def commands(out: str, base: str) -> list[list[str]]:
            return _commands(asked, out, name, done.get("gguf"))

    base = str(found.base)
    done["commands"] = [shlex.join(words) for words in commands(str(asked.output), base)]
    # The file goes where the folder goes, and names no place of this machine.
    moved = commands(".", "BASE_MODEL" if is_local(base) else base)
    lines = [
        f"# {name}: {asked.format}",
        "",
        "Written by `align export`. Called in this folder:",
        "",
    ]
    lines += ["```sh", *(shlex.join(words) for words in moved), "```"]
    write_text(folder / GUIDE, "\n".join(lines) + "\n", flush=False)
    if done["merge"] is not None:  # the configs are others now than those that the merge wrote
        (folder / REPORT).unlink()
        done["merge"] |= {"files": file_digests(folder)}
        write_json(folder / REPORT, done["merge"], flush=False)
    done["files"] = sorted(path.relative_to(folder).as_posix() for path in folder_files(folder))
    return done


# --- weights --------------------------------------------------------------------------------


def _weights(
    asked: Export, source: Source, section: ModelSection, found: Artifact, folder: Path
) -> dict[str, Any] | None:
    """Full weights in the type that is asked for; the report of a merge where there was one."""
    if found.kind == "adapter":
        return merge(
            source.path,
            folder,
            dtype=asked.dtype,
            data=asked.data,
            split=asked.split,
            max_kl=asked.max_kl,
        )
    if "quantization_config" in (found.config or {}):
        fail(
            "is stored quantized",
            where=source.path,
            hint="export the unquantized model; vLLM, llama.cpp and Ollama quantize themselves",
        )
    folder.mkdir(parents=True)
    tokenizer = load_tokenizer(section)
    model: Any = load_policy(section.model_copy(update={"dtype": asked.dtype}))
    check_vocabulary(model, tokenizer)
    if not all(bool(torch.isfinite(weight).all()) for weight in model.state_dict().values()):
        fail(
            f"holds weights that are no finite numbers in {asked.dtype}",
            where=source.path,
            hint="use --dtype bfloat16, which has the range of float32",
        )
    model.generation_config = _generation(model, tokenizer)
    model.save_pretrained(folder, safe_serialization=True, max_shard_size=SHARD)
    tokenizer.save_pretrained(folder)
    return None


def _generation(model: Any, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The model's own settings, which end on every id that ends a turn too."""
    own: GenerationConfig = model.generation_config
    own.eos_token_id = stop_ids(model, tokenizer)
    try:
        own.validate(strict=True)
    except ValueError:  # settings that transformers itself would not save
        own = GenerationConfig(eos_token_id=own.eos_token_id)
    own.bos_token_id, own.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
    return own


def _adapter(source: Source, found: Artifact, folder: Path) -> int:
    """Copy an adapter with its tokenizer; returns the rank that vLLM has to be prepared for."""
    config = found.config or {}
    if found.kind != "adapter" or found.base is None:
        fail("is no adapter", where=source.path, hint="leave --adapter out")
    strange = [key for key in NOT_IN_VLLM if config.get(key)]
    strange += ["bias"] if config.get("bias", "none") != "none" else []
    if strange:
        fail(
            f"vLLM does not serve adapters with {', '.join(strange)}",
            where=source.path,
            hint="leave --adapter out: merged weights hold everything",
        )
    home = Path(source.path).expanduser()
    if not home.is_dir():
        fail("is no folder", where=source.path, hint="vLLM takes a Hub id as it is")
    folder.mkdir(parents=True)
    for file in sorted(home.iterdir()):
        if file.is_file() and file.suffix in (".json", ".safetensors", ".jinja", ".model"):
            shutil.copyfile(file, folder / file.name)
    (folder / IDENTITY_FILE).unlink(missing_ok=True)
    tokenizer = load_tokenizer(policy_section(source.path))
    tokenizer.save_pretrained(folder)
    make_portable(folder)
    if not (folder / "generation_config.json").is_file():
        ends = {"eos_token_id": end_of_turn_ids(tokenizer)}
        write_json(folder / "generation_config.json", ends, flush=False)
    name_base(folder, base=found.base, revision=found.base_revision)
    ranks = [int(config.get("r", 1)), *map(int, (config.get("rank_pattern") or {}).values())]
    rank = next((size for size in LORA_RANKS if size >= max(ranks)), None)
    if rank is None:
        fail(f"has rank {max(ranks)}, more than vLLM takes", where=source.path)
    return rank


# --- for whom -------------------------------------------------------------------------------


def _adapter_command(out: str, name: str, base: str, revision: str | None, rank: int) -> list[str]:
    words = ["vllm", "serve", base]
    words += ["--revision", revision] if revision else []
    words += ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"{name}={out}"]
    # The base has a template and ends of turn of its own, or none: the adapter's are meant.
    words += ["--tokenizer", out, "--generation-config", out]
    return [*words, "--chat-template", f"{out}/chat_template.jinja"]


def _commands(asked: Export, out: str, name: str, gguf: str | None) -> list[list[str]]:
    if asked.format == "vllm":
        return [["vllm", "serve", out, "--served-model-name", name]]
    if asked.format == "ollama":
        return [["ollama", "create", name, "-f", f"{out}/Modelfile"], ["ollama", "run", name]]
    stem, kind = name.replace("/", "-"), GGUF_TYPES[asked.dtype]
    small, file = f"{stem}-Q4_K_M.gguf", f"{stem}-{kind}.gguf"
    convert = ["python", "llama.cpp/convert_hf_to_gguf.py", out, "--outtype", kind]
    convert += ["--model-name", name, "--outfile", file]
    if gguf is not None:
        file = f"{out}/{gguf}"
    rest = [["llama-quantize", file, small, "Q4_K_M"], ["llama-server", "-m", small]]
    return rest if gguf is not None else [convert, *rest]


def _modelfile(asked: Export, source: Source, folder: Path) -> None:
    tokenizer = load_tokenizer(ModelSection(model_name_or_path=str(folder)))
    pieces = find_pieces(tokenizer)
    ids = (read_json(folder / "generation_config.json") or {}).get("eos_token_id") or []
    ids = ids if isinstance(ids, list) else [ids]
    ends = dict.fromkeys([*end_of_turn_ids(tokenizer), *ids])
    stops = [str(tokenizer.convert_ids_to_tokens(end)) for end in ends]
    system = source.system_prompt if asked.system is None else asked.system
    write_text(folder / "Modelfile", modelfile(pieces, stops, system), flush=False)
    # Ollama asks this key, and not the tokenizer, whether a prompt begins with the begin token.
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    begins = bool(tokenizer.bos_token) and str(rendered).startswith(str(tokenizer.bos_token))
    write_json(file, config | {"add_bos_token": begins}, flush=False)


# --- llama.cpp ------------------------------------------------------------------------------


def _converter(asked: Export) -> Path | None:
    """The converter of the checkout that the user names."""
    if asked.llama_cpp is None:
        return None
    if asked.format != "gguf":
        fail("is for --format gguf", where="--llama-cpp", hint="leave it out")
    given = asked.llama_cpp.expanduser()
    file = given / "convert_hf_to_gguf.py" if given.is_dir() else given
    if not file.is_file():
        fail(
            "holds no convert_hf_to_gguf.py",
            where=f"--llama-cpp {given}",
            hint="name a checkout of llama.cpp; its requirements must be installed",
        )
    return file.absolute()


def _convert(asked: Export, folder: Path, converter: Path, name: str) -> str:
    """Let llama.cpp's converter write the GGUF file; the weights that it read are taken away."""
    kind = asked.outtype or GGUF_TYPES[asked.dtype]
    file = f"{name.replace('/', '-')}-{kind}.gguf"  # inside the folder, whatever the name
    command = [sys.executable, str(converter), str(folder), "--outtype", kind]
    command += ["--model-name", name, "--outfile", str(folder / file)]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode != 0 or not (folder / file).is_file():
        last = [line for line in ran.stderr.strip().splitlines() if line.strip()][-1:]
        fail(
            f"failed: {last[0] if last else f'exit code {ran.returncode}'}",
            where=str(converter),
            hint="without --llama-cpp the folder is written for a converter of your choice",
        )
    for weights in (*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")):
        weights.unlink()
    return file
