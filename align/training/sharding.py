"""Training with weights that no process holds whole: FSDP2 by accelerate over torch's `fully_shard`, and ZeRO-3.

What is asked for and what it forbids stands in `align.config.sharding`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from accelerate.utils.operations import convert_to_fp32
from peft import PeftModel
from torch import Tensor, distributed
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


def is_sharded(trainer: Trainer) -> bool:
    """Whether each process of a trainer holds a share of every weight."""
    return bool(trainer.is_fsdp_enabled) or _is_zero3(trainer.accelerator)


def _is_zero3(accelerator: Accelerator) -> bool:
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return False
    return bool(accelerator.state.deepspeed_plugin.zero_stage == 3)


class Sharded:
    """What FSDP2 needs of a trainer that accelerate and TRL do not do by themselves."""

    reference: Any = None
    """A second model that is only read; set before the trainer makes its accelerator."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        accelerator: Accelerator = self.accelerator  # type: ignore[attr-defined]
        if not self.is_fsdp_enabled:  # type: ignore[attr-defined]
            return
        plugin = accelerator.state.fsdp_plugin
        if accelerator.mixed_precision == "bf16":
            # accelerate's own would also add up gradients in bfloat16, and give losses in it.
            plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        if self.reference is not None:
            # TRL would shard it as one piece, which every pass brings together whole, and would take the weights of
            # each process, of which only the first has loaded any.
            fsdp2_prepare_model(accelerator, self.reference)
            in_float32(self.reference)


def in_float32(model: torch.nn.Module) -> None:
    """Give the outputs of a model in float32, as accelerate does where it does not shard: losses are made of them."""
    model.register_forward_hook(lambda _, __, output: convert_to_fp32(output))


def _shares(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
    """The parameters, each with what this process holds of it."""
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            yield parameter, parameter.to_local()
        else:
            yield parameter, getattr(parameter, "ds_tensor", parameter)


def parameters_held(model: torch.nn.Module) -> int:
    """How many numbers of the parameters this process holds itself."""
    return sum(share.numel() for _, share in _shares(model))


def parameter_counts(model: torch.nn.Module) -> tuple[int, int]:
    """Numbers of all parameters, and of those that are trained."""
    found = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(count for count, _ in found), sum(count for count, trained in found if trained)


def all_finite(model: torch.nn.Module) -> bool:
    """Whether every trained weight is finite; each process looks at its shares, and all agree."""
    shares = [share for parameter, share in _shares(model) if parameter.requires_grad]
    return in_all(all(bool(torch.isfinite(share).all()) for share in shares))


def in_all(verdict: bool) -> bool:
    """Whether it holds in every process: what one of them found may not send it another way than the others."""
    if distributed.is_available() and distributed.is_initialized():
        # Between GPUs only what lies on them is sent, and shares may be offloaded to the CPU.
        votes = torch.tensor(int(verdict), device=PartialState().device)
        distributed.all_reduce(votes, distributed.ReduceOp.MIN)
        return bool(votes)
    return verdict


def gathered(trainer: Trainer) -> dict[str, Tensor]:
    """The weights that a stage saves, whole and on the CPU of the main process; the others get nothing.

    Every process calls it. Of a model with an adapter only what was trained is brought together: its base is known.
    """
    if not trainer.is_fsdp_enabled:
        return _gathered_zero3(trainer)
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    adapter = isinstance(trainer.model, PeftModel)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapter)
    found: dict[str, Tensor] = get_model_state_dict(trainer.model, options=options)
    for name in getattr(trainer.model, "all_tied_weights_keys", {}):
        found.pop(name, None)  # brought together twice, they would be saved twice
    return found


def _gathered_zero3(trainer: Trainer) -> dict[str, Tensor]:
    unset_hf_deepspeed_config()  # what the main process loads from now on is its own
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not isinstance(model, PeftModel):
        # What accelerate calls too, but only where `zero3_save_16bit_model` is set, which is for checkpoints.
        found: dict[str, Tensor] | None = (
            trainer.model_wrapped._zero3_consolidated_16bit_state_dict()
        )
        return found or {}
    from deepspeed.runtime.zero import GatheredParameters

    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    with GatheredParameters(list(trained.values())):
        main = trainer.accelerator.is_main_process
        return {name: one.detach().cpu().clone() for name, one in trained.items() if main}
