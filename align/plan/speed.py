"""How long a stage takes: a model of time from products, attention, elementwise traffic and launches.

Floating point operations follow the usual count (arXiv 2001.08361, section 2.1): 2 per parameter and
token forward, 2 for the gradient of the inputs, 2 for that of the weights where these are trained.
The efficiencies below are stated, not measured on the user's machine; docs/plan.md shows how far off
the model is on published throughputs.
"""

from align.plan.gpus import Gpu
from align.plan.memory import NF4, Training, saved
from align.plan.shapes import Shape

ATTENTION = 0.35
"""Share that flash attention reaches, forward and backward together."""

TRAFFIC = 8.0
"""How often a pass reads or writes what a block keeps (casts, copies, norms) in eager code."""

ADAPTER_TRAFFIC = 20.0
"""The same with PEFT's adapters; set on one published row (Llama-2-7B LoRA on an A100, 2,954 tokens/s)."""

COMPILED_TRAFFIC = 3.0
"""The same for compiled or fused blocks."""

DEQUANTIZED_BYTES = 2.52
"""Bytes moved per parameter to unpack nf4 into 16 bits."""

LAUNCH = 6e-6
"""Seconds from one small kernel to the next in eager code."""

KERNELS = 70
"""Kernels of a block in a forward pass with adapters, in eager code."""

BLOCK_DECODE = 0.7e-3
"""Seconds of a block per decoding step of transformers in eager code, however little there is to do."""


def training_seconds(given: Training, gpu: Gpu, *, length: int, passes: float = 0.0) -> float:
    """Seconds of a micro-batch on one device.

    Args:
        given: the step as the memory model sees it.
        gpu: the kind of GPU.
        length: tokens of a sequence.
        passes: further forward passes over the same tokens (a reference, a reward model).
    """
    shape, tokens = given.shape, given.tokens
    again = given.checkpointing != "none"
    body, head = float(shape.active), float(shape.embedding)
    forwards = 1 + again + passes
    products = 2 * body * (forwards + 1 + (not given.adapter)) + 2 * head * (
        2 + passes + (not given.adapter) + (given.loss == "tiles")
    )
    products += 6 * given.adapter
    # Causal: half of 4·S·Q·L forward, two and a half times that backward.
    attention = 2 * length * shape.queries * shape.layers * (forwards + 2.5)
    rounds = COMPILED_TRAFFIC
    if given.layer == "eager":
        rounds = ADAPTER_TRAFFIC if given.adapter else TRAFFIC
    traffic = rounds * saved(given) * shape.layers * (forwards + 1)
    per_token = (
        products / gpu.products
        + attention / (ATTENTION * gpu.tflops * 1e12)
        + traffic / gpu.bandwidth
    )
    fixed = 0.0
    if given.weights in NF4:
        fixed = (forwards + 1) * shape.linear * DEQUANTIZED_BYTES / (0.6 * gpu.bandwidth)
    launches = LAUNCH * KERNELS * shape.layers * (forwards + 2) if given.layer == "eager" else 0.0
    return max(per_token * tokens + fixed, launches)


def forward_seconds(shape: Shape, gpu: Gpu, tokens: float) -> float:
    """Seconds to score tokens with a model, without gradients."""
    return 2 * (shape.active + shape.embedding) * tokens / (gpu.products)


def generation_seconds(
    shape: Shape, gpu: Gpu, *, weights: float, prompts: float, samples: int, prompt: float,
    new: float, batch: int, shared: bool = True,
) -> float:  # fmt: skip
    """Seconds to draw completions in batches.

    Args:
        shape: the model.
        gpu: the kind of GPU.
        weights: bytes of the weights, read once per decoding step.
        prompts: how many prompts.
        samples: completions per prompt.
        prompt: tokens of a prompt.
        new: tokens of a completion, on average.
        batch: completions drawn at once.
        shared: a prompt is computed once for all its completions.
    """
    draws = prompts * samples
    prefill = forward_seconds(shape, gpu, prompt * (prompts if shared else draws))
    cache = shape.kv_bytes * batch * (prompt + new / 2)
    step = max(
        weights / gpu.bandwidth + cache / gpu.bandwidth,
        2 * (shape.active + shape.embedding) * batch / (gpu.products),
        BLOCK_DECODE * shape.layers,
    )
    return prefill + draws / batch * new * step
