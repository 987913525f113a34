"""TRL's trainers over rows that are token ids already.

Each subclass overrides one seam and keeps the rest: the rows are not prepared a second time, and
DPO refuses to train from a wrong reference.
"""

import math
from contextlib import nullcontext
from dataclasses import fields
from typing import Any, TypeAlias

import torch
import trl
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel
from trl.trainer.dpo_trainer import DataCollatorForPreference

from align.data.token_rows import MASK_COLUMNS
from align.errors import fail
from align.training.flat import can_flatten, segments_attended
from align.training.pairs import SharedPairs, agrees_with_padding, padded, pairs_read

Model: TypeAlias = PreTrainedModel | PeftModel

LN2 = math.log(2.0)


def with_lengths(pairs: Dataset) -> Dataset:
    """Pairs with the column `length`, the longer side's tokens, which length grouping reads."""

    def length(row: dict[str, list[int]]) -> dict[str, int]:
        sides = max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        return {"length": sides + len(row.get("prompt_ids", ()))}

    return pairs.map(length, keep_in_memory=True)


class _SameTypes:
    """Weights keep their types when training goes on from a checkpoint.

    TRL trains adapters of a quantized base in bfloat16, and PEFT would read them back as float32, in which the rest
    of the run would be another one.
    """

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        model: Model = self.model  # type: ignore[attr-defined]
        types = {name: parameter.dtype for name, parameter in model.named_parameters()}
        super()._load_from_checkpoint(*args, **kwargs)  # type: ignore[misc]
        for name, parameter in model.named_parameters():
            if parameter.dtype is not types[name]:
                parameter.data = parameter.data.to(types[name])


class _TokenPairs(_SameTypes):
    """Pairs go to the collator as they are, and no card is written beside a checkpoint."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return with_lengths(dataset)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        if "length" not in self._signature_columns:  # else they are gone before they are looked at
            own = ("length", *MASK_COLUMNS)
            self._signature_columns: list[str] = [*self._signature_columns, *own]

    def create_model_card(self, *_: Any, **__: Any) -> None:
        return None


class RewardTrainer(_TokenPairs, trl.RewardTrainer):  # type: ignore[misc]
    """Bradley-Terry on `chosen_ids` and `rejected_ids` (whole sequences), optionally `margin`.

    Args:
        padding_free: compute what both sides of a pair begin with once, and no padding (`SharedPairs`), for
            models whose rewards stay the same; the first batch decides.
    """

    data_collator: Any

    def __init__(self, *args: Any, padding_free: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        fixed_shapes = getattr(self.data_collator, "pad_to_multiple_of", None) is not None
        if padding_free and not fixed_shapes and can_flatten(self.model):
            self.data_collator = SharedPairs(pad_token_id=self.data_collator.pad_token_id)
        self.flat: bool | None = None
        """Whether flat rows are computed as such; known after the first of them."""

    def compute_loss(
        self,
        model: Model,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        if "segments" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self._computes_flat(model, inputs):
            rows = padded(inputs, self.data_collator.pad_token_id)
            return super().compute_loss(model, rows, return_outputs, num_items_in_batch)
        own = self.accelerator.unwrap_model(model)
        with segments_attended(own), pairs_read(own, inputs) as shared:
            return super().compute_loss(model, shared, return_outputs, num_items_in_batch)

    def training_step(
        self, model: Model, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        flat = "segments" in inputs and self._computes_flat(model, inputs)
        # Gradient checkpointing computes layers again in the backward pass, with the same attention.
        own = self.accelerator.unwrap_model(model)
        with segments_attended(own) if flat else nullcontext():
            return super().training_step(model, inputs, *args, **kwargs)

    def _computes_flat(self, model: Model, inputs: dict[str, torch.Tensor]) -> bool:
        if self.flat is None:
            own, batch = self.accelerator.unwrap_model(model), self._prepare_inputs(inputs)
            self.flat = agrees_with_padding(own, batch, self.data_collator.pad_token_id)
        return self.flat


class SFTTrainer(_SameTypes, trl.SFTTrainer):  # type: ignore[misc]
    """Cross-entropy on `input_ids` and `labels`; TRL itself passes such rows through and packs them."""

    def create_model_card(self, *_: Any, **__: Any) -> None:
        return None


class MaskedPairs(DataCollatorForPreference):  # type: ignore[misc]
    """TRL's batches of pairs; a row's `chosen_mask` and `rejected_mask` take tokens out of the loss.

    A masked token counts in no log-probability of policy or reference, so its logits get no
    gradient of their own; it is still read by the tokens behind it.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        mask = batch["completion_mask"]
        sides = ("chosen_mask", "rejected_mask")
        rows = [(example, side) for side in sides for example in examples]
        for row, (example, side) in enumerate(rows):
            if side in example:
                start, kept = len(example["prompt_ids"]), torch.tensor(example[side])
                mask[row, start : start + len(kept)] *= kept
        return batch


class DPOTrainer(_TokenPairs, trl.DPOTrainer):  # type: ignore[misc]
    """DPO on `prompt_ids`, `chosen_ids` and `rejected_ids`.

    Before the first update policy and reference must be the same model: every implicit reward is
    zero, and the sigmoid loss is ln 2 (arXiv 2305.18290, eq. 7 with equal log-ratios).
    """

    reference_checked = False
    data_collator: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if type(self.data_collator) is DataCollatorForPreference:
            given = {
                field.name: getattr(self.data_collator, field.name)
                for field in fields(self.data_collator)
            }
            self.data_collator = MaskedPairs(**given)

    def compute_loss(
        self,
        model: Model,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.reference_checked and self.state.global_step == 0 and self.model.training:
            self.check_reference(loss[0] if return_outputs else loss)
            self.reference_checked = True
        return loss

    def check_reference(self, loss: torch.Tensor) -> None:
        """Refuse to train unless the first batch shows policy == reference.

        Args:
            loss: scalar loss of the first batch, before any update.

        Raises:
            AlignError: a reward is not 0 or, for the plain sigmoid loss, the loss is not ln 2.
        """
        metrics = self._metrics["train"]
        rewards = [metrics[f"rewards/{side}"][-1] for side in ("chosen", "rejected")]
        logps = [abs(metrics[f"logps/{side}"][-1]) for side in ("chosen", "rejected")]
        # Reduced precision and other batch shapes (precomputed references) round the sums a little.
        precision = 1e-5 if self.model.dtype is torch.float32 and not self.args.bf16 else 4e-3
        allowed = self.beta * (1e-3 + precision * max(logps))
        if max(map(abs, rewards)) > allowed:
            fail(
                "policy and reference differ before the first update: mean rewards are "
                f"{rewards[0]:.4g} (chosen) and {rewards[1]:.4g} (rejected) instead of 0",
                where="dpo",
                hint="check model_name_or_path, adapter_name_or_path and adapter_mode: the reference "
                "is the model that the stage starts from",
            )
        plain = self.loss_types == ["sigmoid"] and self.label_smoothing == 0
        if plain and self.f_divergence_type == "reverse_kl":
            weight = self.loss_weights[0]
            steps = self.args.gradient_accumulation_steps
            found = (float(loss.detach()) - self._router_loss()) / weight
            expected = (LN2, LN2 / steps)
            if min(abs(found - value) for value in expected) > max(1e-4, allowed):
                fail(f"the first loss is {found:.6f} instead of ln 2 = {LN2:.6f}", where="dpo")

    def _router_loss(self) -> float:
        """What the routers' load balancing added to the loss of the last batch."""
        found = self._metrics["train"].get("aux_loss") if self.aux_loss_enabled else None
        return float(self.router_aux_loss_coef * found[-1]) if found else 0.0
