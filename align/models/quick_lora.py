"""LoRA layers with fewer passes over memory than PEFT's own forward, and the same numbers."""

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional


class _LowRank(torch.autograd.Function):  # type: ignore[misc]
    """x W^T + b + s (x A^T) B^T for a frozen W, with its products added up in place.

    PEFT scales and adds a tensor of the output's size in both directions; here the scale is a factor of the matrix
    product, and the gradient of x is one sum.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inner = rows @ a.t()
        found = functional.linear(rows, weight, bias).addmm_(inner, b.t(), alpha=scale)
        ctx.save_for_backward(rows, inner, weight, a, b)
        ctx.scale, ctx.shape = scale, x.shape
        return found.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, weight, a, b = ctx.saved_tensors
        slope = gradients[0].reshape(-1, gradients[0].shape[-1])
        back = (slope @ b).mul_(ctx.scale)
        of_a = back.t() @ rows
        of_b = (slope.t() @ inner).mul_(ctx.scale)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (slope @ weight).addmm_(back, a).view(ctx.shape)
        return of_x, None, None, of_a, of_b, None


def quicken(model: PeftModel) -> int:
    """Give plain LoRA layers over frozen linear layers the quick forward pass; returns how many got it.

    At each call PEFT's own forward is used where more than one plain adapter is at work, where types differ
    (autocast), or with dropout, DoRA and quantized weights.
    """
    count = 0
    for module in model.modules():
        if type(module) is LoraLinear and type(module.get_base_layer()) is nn.Linear:
            module.forward = _quick_forward(module)
            count += 1
    return count


def _quick_forward(layer: LoraLinear) -> Any:
    slow = layer.forward

    def forward(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        adapter = _plain_adapter(layer)
        if adapter is None or arguments or options or torch.is_autocast_enabled(x.device.type):
            found: Tensor = slow(x, *arguments, **options)
            return found
        base = layer.get_base_layer()
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        if not x.dtype == base.weight.dtype == a.dtype == b.dtype:
            found = slow(x)
            return found
        quick: Tensor = _LowRank.apply(x, base.weight, base.bias, a, b, layer.scaling[adapter])
        return quick

    return forward


def _plain_adapter(layer: LoraLinear) -> str | None:
    """The one adapter that is at work, if PEFT would do no more with it than two products."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(active) != 1:
        return None
    name = active[0]
    dropout = layer.lora_dropout[name]
    plain = isinstance(dropout, nn.Identity) or dropout.p == 0 or not dropout.training
    odd = name in layer.lora_variant or layer.lora_bias[name] or layer.fan_in_fan_out
    trained_base = layer.get_base_layer().weight.requires_grad
    return name if plain and not odd and not trained_base else None
