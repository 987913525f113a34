# ruff: noqa: E501  (a case reads best on one line)
"""`align plan` against published sizes and measurements of memory, and what a plan costs.

    python benchmarks/plan.py [--no-exact] [--keep-steps]

Every case names its source and the structural settings of the framework that was measured (precision,
checkpointing, kind of loss, where states live). Writes results/plan.md and results/plan.json, and fails where the
training cases miss a median error of 5 % or a worst of 15 %. With `--exact` (the default) the formulas are also
held against fake steps of align's own trainers, which takes a few minutes.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from align.plan.gpus import find_gpu
from align.plan.memory import GIB, SLACK, Training, training_memory
from align.plan.shapes import Shape, known
from align.plan.speed import training_seconds

HERE = Path(__file__).parent
MEDIAN, WORST = 0.05, 0.15

HF_BLOG = "huggingface/blog llama31.md"
TUNE = "pytorch/torchtune README, Memory and training speed"
LADDER = "torchtune README, 3B ladder (A100)"
UNSLOTH = "unsloth.ai/docs/basics/unsloth-benchmarks"
TITAN = "pytorch/torchtitan benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3"
ANSWER = "AnswerDotAI/fsdp_qlora benchmarks_03_2024.md"
FACTORY = "hiyouga/LLaMA-Factory README, table TGS"
AXOLOTL = "axolotl examples/llama-3 README and fft-8b.yaml"


@dataclass(frozen=True)
class Case:
    """One published number and what the planner says."""

    group: str
    name: str
    measured: float
    unit: str
    predicted: float
    source: str
    settings: str
    in_sample: bool = False
    """A choice in the model was made or changed after looking at this row."""

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


@dataclass
class Book:
    cases: list[Case] = field(default_factory=list)

    def add(
        self, group: str, name: str, measured: float, unit: str, bytes_: float, source: str,
        settings: str, in_sample: bool = False,
    ) -> None:  # fmt: skip
        scale = {"GB": 1e9, "GiB": GIB}[unit]
        case = Case(group, name, measured, unit, bytes_ / scale, source, settings, in_sample)
        self.cases.append(case)


def shape(name: str) -> Shape:
    found = known(name)
    assert found is not None, name
    return found


def peak(model: str, **settings: Any) -> float:
    """Bytes at the peak; `rank` stands for an adapter on every linear layer."""
    it = shape(model)
    if rank := settings.pop("rank", 0):
        settings["adapter"] = it.adapter(rank, "all-linear")
    if per := settings.pop("extra_widths", 0):
        settings["extra"] = settings.get("extra", 0) + per * it.hidden * settings["tokens"]
    return training_memory(Training(it, **settings)).total


def published_table(book: Book) -> None:
    """Sizes of the herd: estimates of their authors, states only (8B QLoRA in 6 GB leaves no room for more)."""
    table = {"8b": (60, 16, 6), "70b": (500, 160, 48), "405b": (3250, 950, 250)}
    ways: dict[str, tuple[dict[str, Any], str]] = {
        "full": ({"adapter": 0}, "states only: bf16 weights, gradients, two moments"),
        "LoRA": ({"rank": 16, "adapter_bytes": 2}, "states only: bf16 weights, r 16 on all linear layers"),
        "QLoRA": (
            {"rank": 16, "weights": "nf4", "adapter_bytes": 2},
            "states only: nf4 without double quantization (bitsandbytes' default), r 16",
        ),
    }  # fmt: skip
    for size, row in table.items():
        it = shape(f"llama-3.1-{size}")
        for (way, (given, said)), value in zip(ways.items(), row, strict=True):
            given = dict(given)
            rank = given.pop("rank", 0)
            given["adapter"] = it.adapter(rank, "all-linear") if rank else 0
            memory = training_memory(Training(it, 1, step_in_backward=False, **given))
            full = memory.weights + memory.adapters + memory.optimizer
            gradients = 2.0 * (given["adapter"] or it.parameters)
            name = f"{size.upper()} {way}"
            book.add("training table", name, value, "GB", full + gradients, HF_BLOG, said)


def inference_table(book: Book) -> None:
    sizes = {"8b": (16, 8, 4), "70b": (140, 70, 35), "405b": (810, 405, 203)}
    for size, row in sizes.items():
        it = shape(f"llama-3.1-{size}")
        for (form, per), value in zip({"FP16": 2, "FP8": 1, "INT4": 0.5}.items(), row, strict=True):
            name = f"{size.upper()} {form}"
            book.add("inference", name, value, "GB", it.parameters * per, HF_BLOG, "weights alone")
    caches = {
        "8b": (0.125, 1.95, 15.62),
        "70b": (0.313, 4.88, 39.06),
        "405b": (0.984, 15.38, 123.05),
    }
    for size, row in caches.items():
        it = shape(f"llama-3.1-{size}")
        said = "16-bit K and V"
        if size == "405b":
            it = replace(it, kv_heads=16)
            said += "; 16 key/value heads, as the first upload of this checkpoint had (now 8)"
        for tokens, value in zip((1000, 16000, 128000), row, strict=True):
            # The table's 1k is 1024 tokens and its 16k and 128k are 16,000 and 128,000, in GiB.
            count = 1024 if tokens == 1000 else tokens
            name = f"{size.upper()} KV cache, {tokens:,} tokens"
            book.add("inference", name, value, "GiB", it.kv_bytes * count, HF_BLOG, said)


def torchtune(book: Book) -> None:
    """Compiled blocks, bf16 throughout, packed, chunked cross-entropy; adapters on all linear layers, r 8 to 64."""
    same: dict[str, Any] = {"layer": "compiled", "loss": "chunks", "adapter_bytes": 2}
    two = {"tokens": 4096, **same}
    paged = {"optimizer": "paged_adamw_8bit", "optimizer_on_host": True, "step_in_backward": True}
    base = "compiled, chunked cross-entropy, 2x2048 tokens"
    rows: list[tuple[str, float, str, dict[str, Any], str, bool]] = [
        ("8B QLoRA, 4090", 7.4, "llama-3.1-8b", {"rank": 8, "weights": "nf4-double", **two}, "checkpointing, r 8", False),
        ("8B LoRA, 4090", 16.2, "llama-3.1-8b", {"rank": 8, **two}, "checkpointing, r 8", False),
        ("8B LoRA, A6000", 30.3, "llama-3.1-8b", {"rank": 8, "checkpointing": "none", **two}, "no checkpointing (assumed), r 8", False),
        ("8B full, 4090", 18.9, "llama-3.1-8b", {**paged, **two}, "paged 8-bit Adam stepped in the backward pass, checkpointing", True),
        ("8B full, A6000", 37.4, "llama-3.1-8b", {**paged, "checkpointing": "none", **two}, "as on the 4090, no checkpointing (assumed)", True),
        ("70B LoRA, 8 A100, per GPU", 27.6, "llama-3.1-70b", {"rank": 16, "shards": 8, **two}, "FSDP over 8, checkpointing, r 16", False),
        ("405B QLoRA, 8 A100, per GPU", 44.8e9 / GIB, "llama-3.1-405b", {"rank": 16, "weights": "nf4-double", "shards": 8, **two, "tokens": 2048}, "FSDP over 8, checkpointing, r 16, batch 1 as in its config (the README says 2)", False),
    ]  # fmt: skip
    for name, value, model, given, said, seen in rows:
        book.add(
            "measured", name, value, "GiB", peak(model, **given), TUNE, f"{base}; {said}", seen
        )
    eight = {"tokens": 8192, **same}
    off = {"checkpointing": "none"}
    host = {"checkpointing": "host", "step_in_backward": True}
    steps: list[tuple[str, float, dict[str, Any], str, bool]] = [
        ("packed", 60.0, {**eight, **off, "layer": "eager", "loss": "logits"}, "eager, full logits, no checkpointing, AdamW in bf16", True),
        ("compile", 51.0, {**eight, **off, "loss": "logits"}, "compiled, full logits, no checkpointing", True),
        ("chunked cross-entropy", 42.9, {**eight, **off}, "compiled, chunked, no checkpointing", True),
        ("checkpointing", 24.9, eight, "and checkpointing", False),
        ("step in backward", 23.1, {**eight, "step_in_backward": True}, "and each gradient freed as it comes", True),
        ("activations on host", 21.8, {**eight, **host}, "and checkpoints on the host", False),
        ("8-bit Adam", 17.6, {**eight, **host, "optimizer": "adamw_8bit"}, "and 8-bit states", False),
        ("LoRA", 8.5, {**eight, **host, "rank": 64}, "bf16 base, r 64, checkpoints on the host", False),
        ("QLoRA", 4.6, {**eight, **host, "rank": 64, "weights": "nf4-double"}, "nf4 base, r 64, checkpoints on the host", False),
    ]  # fmt: skip
    for name, value, given, said, seen in steps:
        size = peak("llama-3.2-3b", **given)
        book.add(
            "measured", f"3B {name}", value, "GiB", size, LADDER, f"2x4096 tokens; {said}", seen
        )


def contexts(book: Book) -> None:
    """Longest contexts at a given memory: the prediction at that context against the card."""
    lean: dict[str, Any] = {
        "rank": 32, "weights": "nf4-double", "adapter_bytes": 4, "layer": "fused", "loss": "none",
        "checkpointing": "host", "optimizer": "adamw_8bit", "context": 0.9 * GIB, "extra_widths": 15,
    }  # fmt: skip
    plain: dict[str, Any] = {
        "rank": 32, "weights": "nf4-double", "adapter_bytes": 4, "loss": "logits-upcast",
        "embedding_bytes": 4, "context": 0.9 * GIB,
    }  # fmt: skip
    fast = "fused blocks, checkpoints on the host, r 32; 0.9 GiB of context and 15 H bytes per token are fitted"
    slow = "checkpointing, float32 embeddings (prepare_model_for_kbit_training), full logits with upcast, r 32; the same 0.9 GiB"
    eight = {8: 2972, 12: 21848, 16: 40724, 24: 78475, 48: 191728, 80: 342733}
    for card, tokens in eight.items():
        size = peak("llama-3.1-8b", tokens=tokens, **lean)
        book.add(
            "measured", f"8B Unsloth, {tokens:,} tokens", card, "GiB", size, UNSLOTH, fast, True
        )
    for card, tokens in {48: 12106, 80: 89389}.items():
        size = peak("llama-3.1-70b", tokens=tokens, **lean)
        book.add("measured", f"70B Unsloth, {tokens:,} tokens", card, "GiB", size, UNSLOTH, fast)
    for card, tokens in {12: 932, 16: 2551, 24: 5789, 48: 15502, 80: 28454}.items():
        size = peak("llama-3.1-8b", tokens=tokens, **plain)
        book.add("measured", f"8B HF + FA2, {tokens:,} tokens", card, "GiB", size, UNSLOTH, slow)
    size = peak("llama-3.1-70b", tokens=6916, **plain)
    book.add("measured", "70B HF + FA2, 6,916 tokens", 80, "GiB", size, UNSLOTH, slow)


def others(book: Book) -> None:
    for gpus, rows in {8: (82.4, 77.0), 128: (67.0, 62.0)}.items():
        for way, value in zip(("eager", "compile"), rows, strict=True):
            size = (1 + SLACK) * peak(
                "llama-3.1-8b", tokens=16384, weights="float32", shards=gpus, layer="selective",
                checkpointing="none", loss="logits",
            )  # fmt: skip
            said = "FSDP, float32 states, bf16 compute, per-op selective checkpointing, full logits, 2x8192; reserved memory: + 4 %"
            book.add("measured", f"8B full, {way}, {gpus} H100", value, "GiB", size, TITAN, said)
    for tokens, value in {512: 8.28, 2048: 9.16}.items():
        size = peak(
            "llama-2-7b", tokens=tokens, rank=64, adapter_bytes=2, shards=2, loss="logits-upcast",
        )  # fmt: skip
        said = "FSDP over 2, bf16, r 64, checkpointing, full logits with upcast; allocated memory"
        book.add(
            "measured", f"7B LoRA, {tokens} tokens, per GPU of 2", value, "GiB", size, ANSWER, said
        )
    for name, value, given in (
        ("7B LoRA", 18, {"weights": "float16"}),
        ("7B LoRA 4-bit", 9, {"weights": "nf4-double", "embedding_bytes": 4}),
    ):
        size = peak(
            "llama-2-7b", tokens=4096, rank=8, adapter_bytes=4, loss="logits-upcast",
            context=0.9 * GIB, **given,
        )  # fmt: skip
        said = "HF, batch 4 x 1024 (its wiki), checkpointing, full logits with upcast, r 8"
        book.add("measured", name, value, "GB", size, FACTORY, said)


def uncounted() -> list[tuple[str, float, str, float, str, str]]:
    """Published numbers that the bar does not count: name, value, unit, prediction, source, why."""
    offload = peak(
        "llama-2-70b", tokens=4096, rank=64, weights="nf4", adapter_bytes=2, shards=2,
        weights_on_host=True, optimizer_on_host=True, loss="logits-upcast",
    )  # fmt: skip
    full = peak(
        "llama-3.1-70b", tokens=4096, shards=8, weights_on_host=True, optimizer_on_host=True,
        layer="compiled", loss="chunks", optimizer="adamw_torch_fused",
    )  # fmt: skip
    paged = peak(
        "llama-3-8b", tokens=8192, optimizer="paged_adamw_8bit", optimizer_on_host=True,
        loss="logits-upcast",
    )  # fmt: skip
    return [
        ("70B QLoRA offload, per GPU of 2", 14.92, "GiB", offload / GIB, ANSWER,
         "reserved, not allocated: the page shows 10.24 reserved where 8.28 were allocated"),
        ("70B full offload, per GPU of 8", 13.9, "GiB", full / GIB, TUNE,
         "how much is resident while the host copies is not said"),
        ("8B full, one GPU", 48.0, "GB", paged / 1e9, AXOLOTL, "a size of card that it fits on: an upper bound"),
    ]  # fmt: skip


def speeds() -> list[tuple[str, float, float, str]]:
    """Published tokens per second and device, the model's, and the source. No bar stands on these."""
    rows: list[tuple[str, float, str, str, int, dict[str, Any], str]] = [
        ("8B LoRA, compiled", 3083, "4090", "llama-3.1-8b", 2048, {"rank": 8, "tokens": 4096, "layer": "compiled"}, TUNE),
        ("8B QLoRA, compiled", 2413, "4090", "llama-3.1-8b", 2048, {"rank": 8, "tokens": 4096, "layer": "compiled", "weights": "nf4-double"}, TUNE),
        ("8B LoRA, compiled, no checkpointing", 4699, "a6000", "llama-3.1-8b", 2048, {"rank": 8, "tokens": 4096, "layer": "compiled", "checkpointing": "none"}, TUNE),
        ("3B LoRA, compiled", 8210, "a100-80", "llama-3.2-3b", 4096, {"rank": 64, "tokens": 8192, "layer": "compiled"}, LADDER),
        ("3B full, eager, no checkpointing", 7075, "a100-80", "llama-3.2-3b", 4096, {"tokens": 8192, "checkpointing": "none"}, LADDER),
        ("3B full, compiled", 7210, "a100-80", "llama-3.2-3b", 4096, {"tokens": 8192, "layer": "compiled"}, LADDER),
        ("8B full, FSDP, compiled (500 W)", 6667, "h100", "llama-3.1-8b", 8192, {"tokens": 16384, "layer": "compiled"}, TITAN),
        ("7B LoRA, HF + FA2", 2954, "a100-80", "llama-2-7b", 1024, {"rank": 8, "tokens": 4096}, FACTORY),
        ("7B QLoRA, HF + FA2", 2415, "a100-80", "llama-2-7b", 1024, {"rank": 8, "tokens": 4096, "weights": "nf4-double"}, FACTORY),
        ("70B LoRA, 8 H100", 608, "h100", "llama-3-70b", 4096, {"rank": 16, "tokens": 4096}, "NVIDIA-NeMo/Automodel performance-summary.md"),
    ]  # fmt: skip
    found = []
    for name, measured, kind, model, length, given, source in rows:
        it, gpu = shape(model), find_gpu(kind)
        rank = given.pop("rank", 0)
        adapter = it.adapter(rank, "all-linear") if rank else 0
        step = Training(it, adapter=adapter, adapter_bytes=2, loss="chunks", **given)
        rate = step.tokens / training_seconds(step, gpu, length=length)
        found.append((f"{name}, {gpu.name}", measured, rate, source))
    return found


def against_fake_steps() -> list[dict[str, Any]]:
    """The formulas against fake steps of align's own training stages."""
    from align.training.fake_step import Step, fake_step

    rows: list[tuple[str, str, str, int, bool, int]] = [
        ("llama-3.1-8b", "sft", "nf4-double", 2048, True, 16),
        ("llama-3.1-8b", "sft", "nf4-double", 8192, True, 16),
        ("llama-3.1-8b", "sft", "nf4-double", 2048, False, 16),
        ("llama-3.1-8b", "sft", "bfloat16", 4096, True, 16),
        ("llama-3.1-8b", "sft", "bfloat16", 4096, False, 16),
        ("llama-3.1-8b", "sft", "float32", 2048, True, 0),
        ("llama-3.1-8b", "dpo", "nf4-double", 1024, True, 16),
        ("llama-3.1-8b", "reward", "bfloat16", 2048, True, 16),
        ("llama-3.2-1b", "sft", "bfloat16", 4096, True, 0),
        ("llama-3.2-3b", "sft", "float32", 2048, True, 16),
        ("qwen2.5-7b", "sft", "nf4-double", 4096, True, 64),
        ("mistral-7b-v0.1", "dpo", "bfloat16", 1024, True, 16),
        ("gemma-2b", "sft", "nf4-double", 2048, True, 16),
        ("llama-3.1-70b", "sft", "nf4-double", 2048, True, 16),
    ]
    found = []
    for model, loss, weights, length, checkpointing, rank in rows:
        it = shape(model)
        pair = 1 if loss == "sft" else 2
        counted = fake_step(
            Step(
                config=dict(it.config), loss=loss, weights=weights, rows=pair, length=length,
                checkpointing=checkpointing, autocast=True,
                lora={"r": rank, "target_modules": "all-linear"} if rank else None,
            )
        )  # fmt: skip
        it = it.without_head() if loss == "reward" else it
        adapter = it.adapter(rank, "all-linear") if rank else 0
        given = Training(
            it, pair * length, weights=weights, adapter=adapter, optimizer="adamw_torch",
            adapter_bytes=2 if weights.startswith("nf4") else 4, autocast=True,
            checkpointing="full" if checkpointing else "none",
            loss="none" if loss == "reward" else "tiles",
        )  # fmt: skip
        formula = training_memory(given).total
        way = f"r {rank}" if rank else "full"
        kept = "" if checkpointing else ", no checkpointing"
        name = f"{model} {loss}, {weights}, {way}, {pair} x {length}{kept}"
        row = {"name": name, "counted": counted.peak, "formula": formula, "where": counted.where}
        found.append(row | {"error": formula / counted.peak - 1})
        print(f"{found[-1]['error']:+7.1%}  {name}", flush=True)
    return found


def cost(exact: bool) -> dict[str, Any]:
    """CPU seconds of a plan in a fresh process, the heavy modules it imports, and of one `--exact`."""
    import os

    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}

    def seconds(*words: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "align", "plan", *words, "--json"]
        subprocess.run(command, check=True, capture_output=True, env=environment)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    seconds("llama3-8b/pipeline")  # fills caches
    found: dict[str, Any] = {
        "pipeline_cpu_seconds": round(statistics.median(seconds("llama3-8b/pipeline") for _ in range(5)), 2),
        "stage_cpu_seconds": round(statistics.median(seconds("llama3-8b/sft") for _ in range(5)), 2),
    }  # fmt: skip
    probe = "import sys; from align.plan.report import make_plan; make_plan('llama3-8b/pipeline'); print([m for m in ('torch', 'transformers', 'trl', 'peft', 'datasets', 'numpy', 'pyarrow') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", probe], check=True, capture_output=True, text=True, env=environment
    )
    found["heavy_modules"] = json.loads(done.stdout.replace("'", '"'))
    if exact:
        sets = ("--set", "model.load_in_4bit=true", "--set", "merge_adapter=false")
        started = time.monotonic()
        found["exact_8b_qlora_cpu_seconds"] = round(seconds("llama3-8b/sft", *sets, "--exact"), 1)
        found["exact_8b_qlora_wall_seconds"] = round(time.monotonic() - started, 1)
    return found


def summary(cases: list[Case]) -> dict[str, float]:
    errors = [abs(case.error) for case in cases]
    return {"cases": len(errors), "median": statistics.median(errors), "worst": max(errors)}


def markdown(book: Book, results: dict[str, Any]) -> str:
    lines = [
        "# `align plan` against published numbers",
        "",
        "Made by `python benchmarks/plan.py`.",
        "",
    ]
    titles = {
        "training table": "## Published table of training memory (estimates of its authors)",
        "measured": "## Published measurements of peak memory",
        "inference": "## Published sizes of weights and KV caches",
    }
    for group, title in titles.items():
        lines += [
            title,
            "",
            "| case | published | predicted | error | settings | source |",
            "|---|---|---|---|---|---|",
        ]
        for case in (one for one in book.cases if one.group == group):
            star = " *" if case.in_sample else ""
            lines.append(
                f"| {case.name}{star} | {case.measured:.4g} {case.unit} | {case.predicted:.4g} | "
                f"{case.error:+.1%} | {case.settings} | {case.source} |"
            )
        lines.append("")
    lines += [
        "`*`: in sample. A constant or a term of the model was set or mended after looking at the row.",
        "",
    ]
    lines += ["## Summary", "", "| cases | number | median error | worst |", "|---|---|---|---|"]
    for name, one in results["summary"].items():
        lines.append(f"| {name} | {one['cases']} | {one['median']:.1%} | {one['worst']:.1%} |")
    lines += [
        "",
        "## Published, and not counted",
        "",
        "| case | published | predicted | source | why |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {n} | {v:g} {u} | {p:.4g} | {s} | {w} |" for n, v, u, p, s, w in uncounted()]
    lines += [
        "",
        "## Speed (no bar): tokens per second and device",
        "",
        "| case | published | model | error | source |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {n} | {m:,.0f} | {r:,.0f} | {r / m - 1:+.0%} | {s} |" for n, m, r, s in speeds()]
    if results.get("fake_steps"):
        lines += [
            "",
            "## Formulas against fake steps of align's own stages (`--exact`; no overhead on either side)",
            "",
            "| step | counted GiB | formula | error | peak in |",
            "|---|---|---|---|---|",
        ]
        for row in results["fake_steps"]:
            lines.append(
                f"| {row['name']} | {row['counted'] / GIB:.2f} | {row['formula'] / GIB:.2f} | {row['error']:+.1%} | {row['where']} |"
            )
    lines += ["", "## What a plan costs", ""]
    lines += [f"- {name.replace('_', ' ')}: {value}" for name, value in results["cost"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-exact", action="store_true", help="leave the fake steps out")
    parser.add_argument("--keep-steps", action="store_true", help="keep the last run's fake steps")
    asked = parser.parse_args()
    exact = not asked.no_exact
    steps = (
        json.loads((HERE / "results" / "plan.json").read_text())["fake_steps"]
        if asked.keep_steps
        else None
    )
    book = Book()
    for part in (published_table, torchtune, contexts, others, inference_table):
        part(book)
    barred = [case for case in book.cases if case.group != "inference"]
    results: dict[str, Any] = {
        "summary": {
            "training table and measurements (the bar)": summary(barred),
            "of these, the published table": summary(
                [c for c in barred if c.group == "training table"]
            ),
            "of these, measurements": summary([c for c in barred if c.group == "measured"]),
            "of these, measurements out of sample": summary(
                [c for c in barred if c.group == "measured" and not c.in_sample]
            ),
            "weights and KV caches": summary([c for c in book.cases if c.group == "inference"]),
        },
        "cost": cost(exact),
        "fake_steps": steps or (against_fake_steps() if exact else []),
    }
    text = markdown(book, results)
    cases = [asdict(case) | {"error": case.error} for case in book.cases]
    speed = [{"name": n, "published": m, "model": r, "source": s} for n, m, r, s in speeds()]
    results |= {"cases": cases, "speed": speed}
    out = HERE / "results"
    (out / "plan.md").write_text(text, encoding="utf-8")
    (out / "plan.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    bar = results["summary"]["training table and measurements (the bar)"]
    print(f"median {bar['median']:.1%}, worst {bar['worst']:.1%} of {bar['cases']} cases")
    sys.exit(0 if bar["median"] <= MEDIAN and bar["worst"] <= WORST else 1)


if __name__ == "__main__":
    main()
