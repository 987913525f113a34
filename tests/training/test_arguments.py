"""Arguments reach TRL as they stand in the recipe, and wrong extras are refused."""

from pathlib import Path

import pytest
from accelerate import PartialState
from transformers import TrainingArguments

from align.errors import AlignError
from align.stages.sft import SFTConfig
from align.training.arguments import build, sft_arguments


def config(**trainer) -> SFTConfig:
    return SFTConfig.model_validate(
        {
            "output_dir": "unused",
            "model": {"model_name_or_path": "org/model"},
            "data": {"dataset_name": "org/rows"},
            "trainer": trainer,
        }
    )


def test_extra_reaches_the_trainer(tmp_path: Path):
    assert (
        sft_arguments(config(extra={"neftune_noise_alpha": 5.0}), tmp_path).neftune_noise_alpha == 5
    )


def test_a_process_takes_one_gpu_of_several(tmp_path: Path):
    """The Trainer would spread a batch over all that it sees, which TRL refuses and PPO does not know."""

    class Seen(TrainingArguments):
        def __post_init__(self) -> None:
            super().__post_init__()
            self._n_gpu = 4

    assert Seen(str(tmp_path), use_cpu=True).n_gpu == 4
    assert build(Seen, {"output_dir": str(tmp_path), "use_cpu": True}, {}).n_gpu == 1


def test_sharded_gradients_are_taken_apart_after_every_micro_batch(tmp_path: Path, monkeypatch):
    """Else each process keeps the gradients of the whole model while a step's micro-batches are added up."""
    assert sft_arguments(config(), tmp_path).accelerator_config.gradient_accumulation_kwargs is None
    PartialState(cpu=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    found = sft_arguments(config(), tmp_path).accelerator_config.gradient_accumulation_kwargs
    assert found == {"sync_each_batch": True}


def test_every_wrong_extra_is_named_at_once(tmp_path: Path):
    extra = {"neftune_noise_alfa": 5, "hub_token": "x", "learning_rate": 1.0}
    with pytest.raises(AlignError) as caught:
        sft_arguments(config(extra=extra), tmp_path)
    said = str(caught.value)
    assert len(caught.value.problems) == 3
    assert "did you mean `neftune_noise_alpha`" in said
    assert "decided by align" in said
    assert "set trainer.learning_rate instead" in said


def test_extra_cannot_part_from_the_recipe(tmp_path: Path):
    with pytest.raises(AlignError, match="set by align from other keys"):
        sft_arguments(config(extra={"max_length": 5}), tmp_path)


def test_a_nan_is_never_filtered_out_of_the_log(tmp_path: Path):
    assert sft_arguments(config(), tmp_path).logging_nan_inf_filter is False
