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


class QuickLinear(LoraLinear):  # type: ignore[misc]
    """PEFT's layer with the quick forward pass, wherever that gives the very same.

    A class and no replaced method, so that a deep copy of the model uses the copy's own weights.
    """

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """As PEFT's; x has shape [..., in], the result [..., out]."""
        name = None if arguments or options else self._only_plain_adapter(x)
        if name is None:
            slow: Tensor = super().forward(x, *arguments, **options)
            return slow
        base = self.get_base_layer()
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        quick: Tensor = _LowRank.apply(x, base.weight, base.bias, a, b, self.scaling[name])
        return quick

    def _only_plain_adapter(self, x: Tensor) -> str | None:
        """The one adapter that is at work, if PEFT would do no more with it than two products."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(active) != 1:
            return None
        name = active[0]
        dropout, base = self.lora_dropout[name], self.get_base_layer()
        silent = isinstance(dropout, nn.Identity) or dropout.p == 0 or not dropout.training
        odd = name in self.lora_variant or self.lora_bias[name] or self.fan_in_fan_out
        if odd or not silent or any(weight.requires_grad for weight in base.parameters()):
            return None
        parts = (base, self.lora_A[name], self.lora_B[name])
        if not all(_is_bare(part) for part in parts):
            return None
        types = {x.dtype, *(part.weight.dtype for part in parts)}
        return None if len(types) > 1 or torch.is_autocast_enabled(x.device.type) else name


def _is_bare(part: nn.Module) -> bool:
    """Whether a weight may be read without calling its module: sharding (FSDP, ZeRO-3) wraps or hooks modules to
    bring their weights together."""
    hooked = part._forward_pre_hooks or part._forward_hooks
    return type(part) is nn.Linear and not hooked


def quicken(model: PeftModel) -> int:
    """Give plain LoRA layers over linear layers the quick forward pass; returns how many got it.

    At each call PEFT's own forward is used where more or less than one plain adapter is at work, where types
    differ (autocast), where the base is trained or a part is hooked (sharding), and with dropout and DoRA. Quantized
    layers keep PEFT's own.
    """
    count = 0
    for module in model.modules():
        if type(module) is LoraLinear and type(module.get_base_layer()) is nn.Linear:
            module.__class__ = QuickLinear
            count += 1
    return count
