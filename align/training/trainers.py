"""TRL's trainers over rows that are token ids already.

Each subclass overrides one seam and keeps the rest: the rows are not prepared a second time, and
DPO refuses to train from a wrong reference.
"""

import math
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
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
from align.training.pairs import agrees_with_padding, pairs_shared
from align.training.sharding import Sharded, in_all

Model: TypeAlias = PreTrainedModel | PeftModel

LN2 = math.log(2.0)


def with_lengths(pairs: Dataset) -> Dataset:
    """Pairs with the column `length`, the longer side's tokens, which length grouping reads."""

    def length(row: dict[str, list[int]]) -> dict[str, int]:
        sides = max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        return {"length": sides + len(row.get("prompt_ids", ()))}

    return pairs.map(length, keep_in_memory=True)


class _SameTypes(Sharded):
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


class _SharedPairs(_TokenPairs):
    """Batches of pairs are computed without padding and with each prompt once, by models that give the same that way.

    With dropout both sides of a pair get one mask for what they share.

    Args:
        padding_free: False computes the padded rows. The first batch decides whether the model can do without.
    """

    def __init__(self, *args: Any, padding_free: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        models = [getattr(self, name, None) for name in ("model", "ref_model")]
        # A router's load is balanced over the tokens of the batch as it stands.
        balanced = getattr(self, "aux_loss_enabled", False)
        unwrap = self.accelerator.unwrap_model  # type: ignore[attr-defined]
        self._models: list[Any] = [unwrap(one) for one in models if one is not None]
        # On a CPU the check's forward pass would change how bitsandbytes holds its weights, and a resumed run with it.
        packed = any(
            getattr(one, "is_quantized", False) and one.device.type == "cpu" for one in self._models
        )
        able = padding_free and not balanced and not packed
        able = able and all(map(can_flatten, self._models))
        self.shares_prompts: bool | None = None if able else False
        """Whether prompts are shared; None before the first batch."""

    def compute_loss(
        self, model: Model, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any
    ) -> Any:
        shared = self._shares(inputs)
        with pairs_shared(*self._models) if shared else nullcontext():
            return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def training_step(
        self, model: Model, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        # Gradient checkpointing computes layers again in the backward pass, with the same attention.
        shared = self._shares(inputs)
        with segments_attended(self._models[0]) if shared else nullcontext():
            return super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def _shares(self, inputs: dict[str, torch.Tensor]) -> bool:
        if self.shares_prompts is None:
            batch = self._prepare_inputs(inputs)  # type: ignore[attr-defined]
            ids, mask = batch["input_ids"], batch["attention_mask"]
            agreed = [agrees_with_padding(one, ids, mask) for one in self._models]
            self.shares_prompts = in_all(all(agreed))
        return self.shares_prompts


class RewardTrainer(_SharedPairs, trl.RewardTrainer):  # type: ignore[misc]
    """Bradley-Terry on `chosen_ids` and `rejected_ids` (whole sequences), optionally `margin`."""


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


class DPOTrainer(_SharedPairs, trl.DPOTrainer):  # type: ignore[misc]
    """DPO on `prompt_ids`, `chosen_ids` and `rejected_ids`.

    Before the first update policy and reference must be the same model: every implicit reward is
    zero, and the sigmoid loss is ln 2 (arXiv 2305.18290, eq. 7 with equal log-ratios).
    """

    reference_checked = False
    data_collator: Any

    def __init__(self, *args: Any, ref_model: Model | None = None, **kwargs: Any) -> None:
        self.reference = ref_model
        super().__init__(*args, ref_model=ref_model, **kwargs)
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

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        # TRL reads in every process what the main one wrote, but pairs held in memory have a folder in each.
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        dataset._get_cache_file_path = lambda mark: str(folder / f"reference-{name}-{mark}.arrow")
        return super()._precompute_ref_logps(dataset, name, batch_size)

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
