"""One training step without weights and without a GPU: every tensor is fake, every byte is counted.

torch's FakeTensorMode runs the real code of transformers, PEFT and TRL on tensors that have shapes and
types but no data. A dispatch mode watches each storage from its making to its end, so the peak, and what
lived at the peak, are exact for the tensors that the step makes. What it cannot see: the allocator's
rounding and fragmentation, the CUDA context, buffers of communication, workspaces inside kernels.
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from trl.kernels import chunked_logprob
from trl.trainer.utils import add_fused_lm_head

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

BLOCK, NESTED_BLOCK = 64, 256
"""nf4: weights that share a constant, and constants that share one under double quantization."""


@dataclass(frozen=True)
class Step:
    """What one training step is made of."""

    config: dict[str, Any]
    """The model's config.json."""
    loss: str
    """`sft`, `reward` or `dpo`."""
    weights: str
    """`float32`, `bfloat16`, `float16`, `nf4` or `nf4-double`."""
    rows: int
    """Sequences of one forward pass (both sides of a pair count)."""
    length: int
    """Tokens per sequence."""
    checkpointing: bool
    autocast: bool
    lora: Mapping[str, Any] | None = None
    """Arguments of PEFT's LoraConfig; None trains every parameter."""
    optimizer: str = "adamw_torch"
    attention: str = "counted_attention"


@dataclass
class Measured:
    """Bytes of one fake step."""

    peak: int
    at_peak: dict[str, int]
    """Component -> bytes that lived at the peak."""
    where: str
    """The phase of the peak: forward, backward or optimizer."""
    phases: dict[str, int] = field(default_factory=dict)
    """Phase -> its own peak."""
    parameters: int = 0
    trainable: int = 0


class Ledger(TorchDispatchMode):  # type: ignore[misc]
    """Counts the bytes of all living storages by what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.living: Counter[str] = Counter()
        self.total = self.peak = 0
        self.at_peak: dict[str, int] = {}
        self.where = self.phase = "weights"
        self.phases: Counter[str] = Counter()
        self._seen: dict[int, list[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.count(leaf)
        return result

    def count(self, tensor: torch.Tensor, kind: str | None = None) -> None:
        """Take a tensor's storage into the books, or move it to another kind."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        entry = self._seen.get(key)
        if entry is None:
            entry = [storage.nbytes(), kind or self.phase]
            self._seen[key] = entry
            weakref.finalize(storage, self._gone, key)
            self.living[entry[1]] += entry[0]
            self.total += entry[0]
            self._look()
        elif kind is not None and entry[1] != kind:
            self.living[entry[1]] -= entry[0]
            entry[1] = kind
            self.living[kind] += entry[0]

    def _gone(self, key: int) -> None:
        size, kind = self._seen.pop(key)
        self.living[kind] -= size
        self.total -= size

    def _look(self) -> None:
        self.phases[self.phase] = max(self.phases[self.phase], self.total)
        if self.total > self.peak:
            self.peak, self.where = self.total, self.phase
            self.at_peak = {kind: size for kind, size in self.living.items() if size}

    def forget(self) -> None:
        """Start the peak anew: what building the model needed is not part of the step."""
        self.peak = 0
        self.phases.clear()
        self._look()


class _Dequantized(torch.autograd.Function):  # type: ignore[misc]
    """`x @ W.T` with W unpacked for the product alone, forward and backward, as bitsandbytes does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        ctx.packed, ctx.shape, ctx.dtype = packed, shape, x.dtype
        return x @ torch.empty(shape, dtype=x.dtype, device=x.device).T

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad @ torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device), None, None


class _Flash(torch.autograd.Function):  # type: ignore[misc]
    """Attention as a flash kernel does it: keeps q, k, v, the output and one float per head and token.

    The backward pass sums dq in float32 and, with fewer key/value heads than heads, makes dk and dv
    for every head first (FlashAttention 2, which torch's own CUDA kernels are).
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows, heads, length, _ = q.shape
        out = q.new_empty(rows, length, heads, v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(rows, heads, length, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, _, _ = ctx.saved_tensors
        sums = torch.empty_like(q, dtype=torch.float32)
        every = [one.new_empty(*q.shape[:3], one.shape[-1]) for one in (k, v)]
        del sums, every
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _flash(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *_: Any,
    **__: Any,
) -> tuple[torch.Tensor, None]:
    return _Flash.apply(query, key, value), None


AttentionInterface.register("counted_attention", _flash)


class PackedLinear(nn.Linear):  # type: ignore[misc]
    """A linear layer whose weight is bytes of nf4 with their constants, sized as bitsandbytes sizes them."""

    def __init__(self, like: nn.Linear, *, double: bool) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = like.in_features, like.out_features
        size = like.in_features * like.out_features
        blocks = -(-size // BLOCK)
        packed = torch.empty((size + 1) // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = like.bias
        kind = torch.uint8 if double else torch.float32
        self.register_buffer("absmax", torch.empty(blocks, dtype=kind))
        if double:
            nested = torch.empty(-(-blocks // NESTED_BLOCK), dtype=torch.float32)
            self.register_buffer("nested_absmax", nested)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = input.to(torch.bfloat16)
        shape = torch.Size((self.out_features, self.in_features))
        product: torch.Tensor = _Dequantized.apply(x, self.weight, shape)
        return product if self.bias is None else product + self.bias


def _pack(model: PreTrainedModel, *, double: bool) -> None:
    """Replace the linear layers that bitsandbytes would quantize: all but the heads."""
    spared = {id(model.get_output_embeddings()), id(getattr(model, "score", None))}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and id(child) not in spared:
                setattr(parent, name, PackedLinear(child, double=double))


def _build(step: Step) -> Any:
    """The model of a stage as TRL's trainers prepare it, all of it fake."""
    settings = dict(step.config)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    quantized = step.weights.startswith("nf4")
    dtype = torch.bfloat16 if quantized else DTYPES[step.weights]
    options = {"dtype": dtype, "attn_implementation": step.attention}
    if step.loss == "reward":
        config.num_labels = 1
        config.pad_token_id = 0
        model = AutoModelForSequenceClassification.from_config(config, **options)
    else:
        model = AutoModelForCausalLM.from_config(config, **options)
        add_fused_lm_head(model)
    if quantized:
        _pack(model, double=step.weights == "nf4-double")
    if step.lora is not None:
        task = TaskType.SEQ_CLS if step.loss == "reward" else TaskType.CAUSAL_LM
        model = get_peft_model(model, LoraConfig(task_type=task, **step.lora))
        if quantized:  # as TRL does: the adapters of a quantized base are bfloat16
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)
    model.config.use_cache = False
    model.train()
    if step.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        if step.lora is not None:
            model.enable_input_require_grads()
    return model


def _place(model: nn.Module) -> None:
    """Give every parameter and buffer a fake storage on the CPU; shared ones stay shared."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for kept in (module._parameters, module._buffers):
            for name, old in kept.items():
                if old is None:
                    continue
                new = made.get(id(old))
                if new is None:
                    new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                    if isinstance(old, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=old.requires_grad)
                    made[id(old)] = new
                kept[name] = new


def _loss(model: Any, step: Step, ids: torch.Tensor) -> torch.Tensor:
    """The stage's loss on rows of ids; its value means nothing, its tensors are those of the stage."""
    if step.loss == "reward":
        scores = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 0]
        chosen, rejected = scores.chunk(2)
        return -nn.functional.logsigmoid(chosen - rejected).mean()
    given = {"input_ids": ids, "labels": ids, "fused_lm_head": True}
    if step.loss == "sft":
        loss: torch.Tensor = model(**given).loss
        return loss
    with torch.no_grad():
        off = model.disable_adapter() if step.lora is not None else contextlib.nullcontext()
        with off:
            reference = model(**given).log_probs.sum(-1)
    ratios = model(**given).log_probs.sum(-1) - reference
    chosen, rejected = ratios.chunk(2)
    return -nn.functional.logsigmoid(chosen - rejected).mean()


class _Optimizer(torch.optim.Optimizer):  # type: ignore[misc]
    """Stands for AdamW: makes the tensors that it makes (a fake tensor has no step count to read).

    torch's AdamW keeps two moments in the type of the weights and, on a GPU, takes the root of the
    second one for all weights at once (`foreach`), unless it is fused. 8-bit AdamW keeps a byte per
    moment and a constant per 256 of them.
    """

    def __init__(self, name: str, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {})
        self.bytewise = "8bit" in name
        self.foreach = name == "adamw_torch"

    def step(self, closure: Any = None) -> None:
        parameters = [one for group in self.param_groups for one in group["params"]]
        for parameter in parameters:
            if parameter in self.state:
                continue
            moment = torch.empty_like(parameter, dtype=torch.uint8 if self.bytewise else None)
            self.state[parameter] = {"first": moment, "second": torch.empty_like(moment)}
            if self.bytewise:
                constants = torch.empty(2 * -(-parameter.numel() // 256), dtype=torch.float32)
                self.state[parameter]["constants"] = constants
        if self.foreach:
            torch._foreach_sqrt([self.state[parameter]["second"] for parameter in parameters])


@contextlib.contextmanager
def _in_place_kernels() -> Iterator[None]:
    """TRL's tiles as on a GPU, where kernels rewrite them in place and products add up in place."""

    def kernel(*_: Any, **__: Any) -> None:
        return None

    with (
        mock.patch.object(chunked_logprob, "_forward_tile", kernel),
        mock.patch.object(chunked_logprob, "_backward_tile", kernel),
        mock.patch.object(chunked_logprob, "_addmm_fp32", kernel),
    ):
        yield


def _sort(ledger: Ledger, model: Any, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Name the lasting storages: weights, adapters (or trained weights), gradients, optimizer."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        adapter = tensor.requires_grad and ("lora_" in name or "modules_to_save" in name)
        ledger.count(tensor, "adapters" if adapter else "weights")
        if tensor.grad is not None:
            ledger.count(tensor.grad, "gradients")
    for state in optimizer.state.values() if optimizer else ():
        for value in tree_leaves(dict(state)):
            if isinstance(value, torch.Tensor):
                ledger.count(value, "optimizer")


def _one_step(
    ledger: Ledger, model: Any, optimizer: torch.optim.Optimizer, step: Step, ids: torch.Tensor
) -> None:
    ledger.forget()
    ledger.phase = "forward"
    with torch.autocast("cpu", torch.bfloat16, enabled=step.autocast):
        loss = _loss(model, step, ids)
    ledger.phase = "backward"
    loss.backward()
    del loss
    ledger.phase = "optimizer step"
    optimizer.step()


def fake_step(step: Step) -> Measured:
    """Run two optimizer steps on fake tensors (the second finds the optimizer's state) and count.

    Returns:
        Bytes at the peak of the second step, by component. `activations` are what the forward pass
        keeps for the backward pass; `working` is everything that comes and goes.
    """
    ledger = Ledger()
    with torch.device("meta"):
        model = _build(step)
    with FakeTensorMode(allow_non_fake_inputs=True), _in_place_kernels():
        _place(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:  # gradients count from the moment they are accumulated
            parameter.register_post_accumulate_grad_hook(
                lambda parameter: ledger.count(parameter.grad, "gradients")
            )
        optimizer = _Optimizer(step.optimizer, trained)
        _sort(ledger, model)
        ids = torch.ones(step.rows, step.length, dtype=torch.int64)
        for _ in range(2):
            with ledger:
                _one_step(ledger, model, optimizer, step, ids)
            _sort(ledger, model, optimizer)
            optimizer.zero_grad(set_to_none=True)
        counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    named = {"forward": "activations", "backward": "working", "optimizer step": "working"}
    found: Counter[str] = Counter()
    for kind, size in ledger.at_peak.items():
        found[named.get(kind, kind)] += size
    return Measured(
        ledger.peak,
        dict(found),
        ledger.where,
        dict(ledger.phases),
        sum(size for size, _ in counts),
        sum(size for size, on in counts if on),
    )
