"""The fewest GPUs of a kind that hold a model: trained in full, by LoRA, by QLoRA; served in FP16, FP8, INT4."""

from collections.abc import Callable
from dataclasses import replace

from align.plan.gpus import Gpu
from align.plan.memory import CONTEXT, SLACK, Training, training_memory
from align.plan.shapes import Shape

LENGTH = 2048
"""Tokens of the one row that is trained on."""

SERVED = 8192
"""Tokens of KV cache that a served model has beside its weights."""

MOST = 4096

FORMATS = {"FP16": 2.0, "FP8": 1.0, "INT4": 0.5}
"""Bytes per parameter, of all parameters, as the published tables count."""


def training_ways(shape: Shape) -> dict[str, Training]:
    """Full (bfloat16 states, as the published tables count), LoRA and QLoRA at r 16, batch 1."""
    adapter = shape.adapter(16, "all-linear")
    base = Training(shape, LENGTH, context=CONTEXT)
    return {
        "full": base,
        "LoRA": Training(shape, LENGTH, adapter=adapter, context=CONTEXT),
        "QLoRA": Training(
            shape, LENGTH, weights="nf4-double", adapter=adapter, adapter_bytes=2, context=CONTEXT
        ),
    }


def fewest_for_training(shape: Shape, gpu: Gpu) -> dict[str, int | None]:
    """Way -> GPUs over which its states must be sharded; None above 4096."""

    def holds(given: Training) -> Callable[[int], bool]:
        def fits(count: int) -> bool:
            memory = training_memory(replace(given, shards=count))
            return memory.total * (1 + SLACK) <= gpu.usable

        return fits

    return {way: _fewest(holds(given)) for way, given in training_ways(shape).items()}


def fewest_for_inference(shape: Shape, gpu: Gpu) -> dict[str, int | None]:
    """Format -> GPUs that hold the weights and the KV cache of one sequence of 8,192 tokens."""
    cache = shape.kv_bytes * min(SERVED, shape.positions or SERVED)

    def holds(per: float) -> Callable[[int], bool]:
        def fits(count: int) -> bool:
            return (shape.parameters * per + cache) / count + CONTEXT <= gpu.usable

        return fits

    return {name: _fewest(holds(per)) for name, per in FORMATS.items()}


def _fewest(fits: Callable[[int], bool]) -> int | None:
    """The smallest count that fits, by doubling and bisection."""
    high = 1
    while not fits(high):
        high *= 2
        if high > MOST:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
