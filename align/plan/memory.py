"""Peak memory of a training step and of generation, by component. docs/plan.md derives every term.

The coefficients of a block are counted, not fitted: they are the tensors that autograd keeps for a
decoder block of transformers (`align plan --exact` counts the same ones one by one).
"""

from dataclasses import dataclass, field, fields
from typing import Literal

from align.plan.shapes import BYTES, Shape

GIB = 2**30

NF4 = {"nf4": 0.5 + 4 / 64, "nf4-double": 0.5 + 1 / 64 + 4 / (64 * 256)}
"""Bytes per parameter: half a byte, a float32 constant per 64 (QLoRA, arXiv 2305.14314, section 3);
under double quantization a byte per 64 and a float32 per 256 of those."""

TILE_TOKENS, TILE_VOCABULARY = 4096, 32768
"""Tile of TRL's fused head (trl/kernels/chunked_logprob.py)."""

CONTEXT = 0.6e9
"""CUDA context, cuBLAS workspaces and NCCL buffers: what a device loses before the first tensor."""

SLACK = 0.04
"""Share that the caching allocator holds beyond what lives at the peak (rounding, fragments)."""

Layer = Literal["eager", "compiled", "fused", "selective"]
Loss = Literal["tiles", "logits", "logits-upcast", "chunks", "none"]
Checkpointing = Literal["none", "full", "host"]


@dataclass(frozen=True)
class Training:
    """The settings of a training step that its memory depends on."""

    shape: Shape
    tokens: int
    """Tokens of a micro-batch on a device, padding included (both sides of a pair)."""
    weights: str = "bfloat16"
    """Format of the base: a key of BYTES or NF4."""
    adapter: int = 0
    """Parameters trained beside a frozen base; 0 trains the base itself."""
    adapter_bytes: int = 4
    """Bytes per trained adapter parameter; its gradient has the same."""
    optimizer: str = "adamw_torch_fused"
    optimizer_on_host: bool = False
    """Paged or offloaded states."""
    step_in_backward: bool = False
    """Each gradient is used up and freed as it comes."""
    checkpointing: Checkpointing = "full"
    layer: Layer = "eager"
    autocast: bool = False
    """bfloat16 autocast over weights or adapters in float32."""
    dropout: bool = False
    loss: Loss = "tiles"
    shards: int = 1
    """Devices that weights, gradients and optimizer are spread over (FSDP, ZeRO-3)."""
    master_weights: bool = False
    """Trained weights are kept and their gradients summed in float32, while 16-bit copies compute (FSDP2)."""
    weights_on_host: bool = False
    """Sharded weights live in host memory between uses."""
    replicas: int = 1
    """Data-parallel copies: gradients are copied into buckets once more."""
    embedding_bytes: int | None = None
    """Bytes per parameter of embedding and head; 16 bits, or the base's own when unset."""
    reference: bool = False
    """A frozen copy of the base stands beside it (full-parameter DPO)."""
    extra: int = 0
    """Further bytes that live all the time."""
    context: float = 0.0
    """Bytes that the device loses to the context; 0 where only torch's own tensors count."""


@dataclass(frozen=True)
class Memory:
    """Bytes per device at the peak."""

    weights: float = 0.0
    adapters: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    """What the forward pass keeps for the backward pass."""
    working: float = 0.0
    """What a block, a gathered layer or the optimizer step needs for a moment."""
    logits: float = 0.0
    """The head and its loss."""
    kv_cache: float = 0.0
    overhead: float = 0.0
    """CUDA context and allocator."""
    phase: str = field(default="", compare=False)
    """When the peak is: `loss`, `backward`, `last gradients`, `optimizer step`, `decoding`."""

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, float]:
        """Component -> bytes."""
        names = [one.name for one in fields(self) if one.name != "phase"]
        return {name: float(getattr(self, name)) for name in names}

    @property
    def states(self) -> float:
        """Weights, adapters, gradients and optimizer: what published tables of sizes count."""
        return self.weights + self.adapters + self.gradients + self.optimizer


def weight_bytes(shape: Shape, weights: str, embedding_bytes: int | None = None) -> float:
    """Bytes of a base. nf4 and int8 hold linear layers only: the rest stays in 16 bits."""
    if weights in NF4 or weights == "int8":
        per = NF4.get(weights, 1.0)
        outside = shape.fused + shape.small
        return shape.linear * per + outside * 2 + shape.embeddings * (embedding_bytes or 2)
    per = BYTES[weights]
    inside = shape.parameters - shape.embeddings
    return inside * per + shape.embeddings * (embedding_bytes or per)


def optimizer_bytes(name: str, parameter_bytes: float) -> float:
    """Bytes of state per trained parameter: two moments in the parameter's type, or two bytes and
    a float32 constant per 256 values each (8-bit); Adafactor and SGD keep next to nothing."""
    if "8bit" in name:
        return 2 + 2 * 4 / 256
    if "4bit" in name:
        return 1 + 2 * 2 / 128
    if name.startswith("lion") or name == "rmsprop":
        return parameter_bytes
    if name.startswith(("adafactor", "sgd", "adalomo", "lomo")):
        return 0.0
    return 2 * parameter_bytes


def saved(given: Training) -> float:
    """Bytes per token that one block keeps for its backward pass.

    eager: float32 input of both norms (8H) and their outputs (4H), q, k, v and the attention's
    output (4Q + 4KV), gate, silu(gate), up and their product (8I). Autocast over float32 adapters
    makes the input of every product anew; float32 weights keep q, k, v and the norms in float32.
    """
    shape = given.shape
    width, queries, keys, inner = shape.hidden, shape.queries, shape.keys, _inner(shape)
    full = not given.adapter
    if given.layer == "compiled":
        return (10 if full else 8) * width + 4 * keys + 6 * inner
    if given.layer == "fused":
        return 6 * width + 4 * queries + 4 * keys + 4 * inner
    if given.layer == "selective":
        # torchtitan's per-op rule: attention and every second product are kept (wq, wv, w1, w2),
        # with the block's input.
        return 4 * width + 4 * queries + 2 * keys + 2 * inner
    single = given.weights == "float32"
    if single and not given.autocast:
        return (24 if full else 16) * width + 8 * (queries + keys) + 16 * inner
    anew = _wide_adapters(given)
    wide, q, k = 12.0 + (4 if full else 6 if anew else 0), 4.0 + (2 if anew else 0), 4.0
    if single:
        wide, q, k = wide + (10 if full else 0), q + (6 if full else 4), 6.0
    total = wide * width + q * queries + k * keys + 8 * inner
    if given.dropout and not full:
        # A mask and a scaled copy of the input of each of the seven adapters.
        total += (20 if anew else 16) * width + 4 * queries + (4 if anew else 2) * inner
    return total


def _wide_adapters(given: Training) -> bool:
    """Whether adapters are float32 and autocast turns their inputs up and down again."""
    return bool(given.adapter) and given.autocast and given.adapter_bytes == 4


def _inner(shape: Shape) -> int:
    """Width of the MLP that a token meets: with experts, all that are chosen for it."""
    if not shape.experts:
        return shape.intermediate
    inner = int(shape.config.get("moe_intermediate_size") or shape.intermediate)
    return inner * (shape.active_experts + int(shape.config.get("n_shared_experts") or 0))


def transient(given: Training) -> float:
    """Bytes per token that the backward pass of a block needs beside what was kept."""
    width, inner = given.shape.hidden, _inner(given.shape)
    if given.layer == "compiled":
        return 3 * inner
    if given.layer == "fused":
        return 4 * width + 2 * inner
    wide = _wide_adapters(given) or (given.weights == "float32" and not given.autocast)
    return (8 if wide else 4) * inner


def _unpacked(given: Training) -> float:
    """Weights of a block in 16 bits: the largest layer that a 4-bit product unpacks, or all that
    autocast copies from float32."""
    sizes = [one.size for one in given.shape.block() if not one.fused]
    if given.weights in NF4:
        return 2.0 * max(sizes)
    return 2.0 * sum(sizes) if given.weights == "float32" and given.autocast else 0.0


def loss_bytes(given: Training) -> float:
    """Bytes of the head and its loss for a micro-batch."""
    shape, tokens = given.shape, given.tokens
    full = not given.adapter
    if given.loss == "none":
        return 0.0
    if given.loss == "tiles":
        tile = min(tokens, TILE_TOKENS) * 2 * TILE_VOCABULARY  # also for smaller vocabularies
        hidden = 6 * shape.hidden * tokens
        # The head's gradient is summed in float32, then cast; tied heads add it to the embedding's.
        own = (4 + BYTES.get(given.weights, 2)) * shape.embedding if full else 0
        if given.weights == "float32":  # the rows of the head in 16 bits
            tile += 2 * shape.hidden * min(shape.vocab, TILE_VOCABULARY)
        return tile + hidden + own
    head = _gradient_bytes(given) * shape.embedding if full else 0
    if given.loss == "chunks":
        # Eight chunks of 16-bit logits; every chunk adds its gradient of the head to the sum so far.
        return 2 * shape.vocab * tokens * 9 / 8 + 2 * head
    return (18 if given.loss == "logits-upcast" else 12) * shape.vocab * tokens + head


def _gradient_bytes(given: Training) -> float:
    return BYTES.get(given.weights, 2.0) if not given.adapter else given.adapter_bytes


def training_memory(given: Training) -> Memory:
    """The largest of the phases of a step: loss, first block backward, last gradients, update."""
    shape, tokens = given.shape, given.tokens
    base = weight_bytes(shape, given.weights, given.embedding_bytes)
    if given.master_weights:
        base = 4.0 * shape.parameters
    trained = given.adapter or shape.parameters
    each = given.adapter_bytes if given.adapter else base / shape.parameters
    states = 0.0 if given.optimizer_on_host else optimizer_bytes(given.optimizer, each) * trained
    lasting = {
        "weights": (0.0 if given.weights_on_host else base / given.shards)
        + (base / given.shards if given.reference else 0.0),
        "adapters": given.adapter * given.adapter_bytes / given.shards,
        "optimizer": states / given.shards,
    }
    gradients = 0.0 if given.weights_on_host else trained * each / given.shards
    if given.replicas > 1:
        gradients *= 2
    if given.step_in_backward:
        gradients = each * max(shape.embedding, max(one.size for one in shape.block()))
    kept = _kept(given)
    block = tokens * (saved(given) + transient(given)) + _unpacked(given)
    if given.checkpointing == "none":
        block -= tokens * saved(given)
    gathered = _gathered(given)
    casts = _casts(given)
    head = loss_bytes(given)
    # torch's default on a GPU takes the root of all second moments at once (`foreach`).
    step = trained * each / given.shards if given.optimizer == "adamw_torch" else 0.0
    phases = (
        Memory(activations=kept + casts, logits=head, working=gathered, phase="loss"),
        Memory(
            activations=kept + (casts if given.checkpointing == "none" else 0),
            working=block + _gathered(given, gradients=True),
            gradients=(BYTES.get(given.weights, 2.0) * shape.embedding / given.shards)
            if not given.adapter
            else 0.0,
            phase="backward",
        ),
        Memory(
            gradients=gradients,
            working=block
            + _gathered(given, gradients=True)
            + (tokens * saved(given) if given.checkpointing == "none" else 0),
            phase="last gradients",
        ),
        Memory(gradients=gradients, working=step, phase="optimizer step"),
    )
    peak = max(phases, key=lambda one: one.total)
    parts = {name: size + lasting.get(name, 0.0) for name, size in peak.parts.items()}
    parts["overhead"] += given.context + given.extra
    return Memory(**parts, phase=peak.phase)


def _casts(given: Training) -> float:
    """16-bit copies of float32 weights that autocast keeps through the forward pass: those of
    trained weights by its cache, those of frozen ones where no checkpoint drops them."""
    if given.weights != "float32" or not given.autocast:
        return 0.0
    kept = not given.adapter or given.checkpointing == "none"
    return 2.0 * given.shape.linear if kept else 0.0


def _kept(given: Training) -> float:
    """What the whole forward pass keeps: the blocks' inputs, or all that blocks keep."""
    shape, tokens = given.shape, given.tokens
    width = (4 if given.weights == "float32" else 2) * shape.hidden
    if given.checkpointing == "none":
        return shape.layers * tokens * saved(given)
    if given.checkpointing == "host":
        return 3 * tokens * width  # the one in use and two on their way
    return shape.layers * tokens * width


def _gathered(given: Training, *, gradients: bool = False) -> float:
    """Sharded: two blocks are whole at a time, and the largest of embedding and head with them.

    A trained base has whole gradients of a block before they are spread: 16 bits, and float32 where
    they are summed in it.
    """
    if given.shards == 1 and not given.weights_on_host:
        return 0.0
    sizes = sum(one.size for one in given.shape.block(given.shape.layers - 1))
    whole = 2 * sizes * NF4.get(given.weights, 2.0) + 2 * given.shape.embedding
    if given.adapter:
        return whole
    if not gradients:
        return whole + (2 * given.shape.embedding if given.weights == "float32" else 0)
    summed_in_float32 = given.weights == "float32" or given.master_weights
    return whole + sizes * (6 if summed_in_float32 else 2)


def generation_memory(
    shape: Shape,
    weights: str,
    *,
    sequences: int,
    prompts: int,
    prompt: int,
    new: int,
    adapter: int = 0,
    beside: float = 0.0,
) -> Memory:
    """Peak of drawing completions: weights, KV cache of every live token, prompt pass, logits.

    Args:
        shape: the model.
        weights: its number format.
        sequences: completions drawn at once.
        prompts: different prompts among them; each is computed once.
        prompt: longest prompt in tokens.
        new: longest completion in tokens.
        adapter: parameters of an adapter that stays apart (float32).
        beside: bytes of a further model that is loaded at the same time.
    """
    base = weight_bytes(shape, weights)
    cache = shape.kv_bytes * sequences * (prompt + new)
    # Sampling sorts and sums float32 logits: four copies. The MLP of the prompt pass: gate, up, product.
    logits = 4 * 4 * shape.vocab * sequences
    working = prompts * prompt * (6 * _inner(shape) + 8 * shape.hidden)
    return Memory(
        weights=base + beside,
        adapters=4.0 * adapter,
        kv_cache=cache,
        logits=logits,
        working=working,
        overhead=CONTEXT,
        phase="decoding",
    )
