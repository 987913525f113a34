"""What a run runs on: versions, hardware, launch, command line, memory. Imports no heavy library."""

import ctypes
import os
import platform
import re
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from align.secrets import scrub_arguments

LIBRARIES = (
    "align",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "tokenizers",
    "safetensors",
    "numpy",
    "pyarrow",
    "pydantic",
)

LAUNCH_VARIABLES = (
    "WORLD_SIZE",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_MIXED_PRECISION",
    "SLURM_JOB_ID",
)

ALLOW_CODE = "ALIGN_ALLOW_CODE"
"""Set to 1 by `--allow-code`: a reward function may then come from a file. No recipe can set it."""


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of glibc's `mallopt` (malloc.h)."""

OWN_MALLOC = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Let the process keep what it frees for its next tensors; returns whether that could be set.

    glibc hands large blocks back to the system at once, and the next step has every page of its activations
    cleared and mapped again: a fifth of the processor time of a sampling stage on the tiny model. Blocks above
    32 MiB (weights, logits) still go back. Nothing is set where the user tunes malloc, or without glibc.
    """
    if any(name in os.environ for name in OWN_MALLOC):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, 32 << 20) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def is_main() -> bool:
    """Whether this process is the one that writes and prints (rank 0)."""
    return int(os.environ.get("RANK", "0")) == 0


def world_size() -> int:
    """Processes of this launch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@cache
def library_version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _first_match(file: str, pattern: str) -> str | None:
    try:
        found = re.search(pattern, Path(file).read_text(encoding="utf-8", errors="replace"), re.M)
    except OSError:
        return None
    return found.group(1).strip() if found else None


def _accelerators() -> list[dict[str, Any]]:
    """The GPUs as torch sees them; empty where torch is not loaded (it is not loaded for this)."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    found = []
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        found.append({"name": facts.name, "memory_bytes": facts.total_memory})
    return found


def environment() -> dict[str, Any]:
    """Versions, hardware and launch of this process, as JSON values."""
    memory = _first_match("/proc/meminfo", r"^MemTotal:\s+(\d+) kB")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "cpu": _first_match("/proc/cpuinfo", r"^model name\s*:(.*)$") or platform.processor(),
        "cpu_cores": os.cpu_count(),
        "memory_bytes": int(memory) * 1024 if memory else None,
        "accelerators": _accelerators(),
        "versions": {name: found for name in LIBRARIES if (found := library_version(name))},
        "launch": {name: os.environ[name] for name in LAUNCH_VARIABLES if name in os.environ},
        "command": scrub_arguments(sys.argv),
    }
