"""What is trained, how it is saved, and that two joined adapters equal both put on together."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from align.config.sections import LoraSection, ModelSection
from align.errors import AlignError
from align.models.adapters import (
    check_joinable,
    expose_trained_head,
    join_adapters,
    lora_config,
    save_adapter,
)
from align.models.tokenizer import control_token_ids

IDS = torch.tensor([[0, 2, 40, 50, 60, 70, 4]])


def base(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def adapter(llama: Path, folder: Path, seed: int, tokenizer=None, **section) -> Path:
    """Save an adapter with random weights."""
    torch.manual_seed(seed)
    model = get_peft_model(base(llama), lora_config(LoraSection(**section), tokenizer=tokenizer))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    save_adapter(model, folder, base=str(llama), revision="main")
    return folder


@pytest.mark.parametrize("section", [{"use_rslora": True}, {"lora_alpha": 8}])
def test_joined_adapters_equal_both_together(llama, tmp_path, section):
    first = adapter(llama, tmp_path / "first", 1, lora_r=4)
    second = adapter(llama, tmp_path / "second", 2, lora_r=8, **section)
    join_adapters(base(llama), str(first), str(second), tmp_path / "joined")
    merged = PeftModel.from_pretrained(base(llama), first).merge_and_unload()
    expected = PeftModel.from_pretrained(merged, second)(IDS).logits
    joined = PeftModel.from_pretrained(base(llama), tmp_path / "joined")
    assert joined.peft_config["default"].r == 12
    torch.testing.assert_close(joined(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, base(llama)(IDS).logits, atol=1e-2)


def test_dora_cannot_be_joined_and_says_the_way_out(llama, tmp_path):
    first = adapter(llama, tmp_path / "first", 1, use_dora=True)
    section = ModelSection(model_name_or_path=str(llama), adapter_name_or_path=str(first))
    with pytest.raises(AlignError, match=r"`use_dora`[\s\S]*merge_adapter: true"):
        check_joinable(section, LoraSection(), merge_adapter=False)
    check_joinable(section, LoraSection(), merge_adapter=True)


def test_a_new_adapter_that_is_more_than_lora_cannot_be_joined(llama, tmp_path):
    first = adapter(llama, tmp_path / "first", 1)
    section = ModelSection(model_name_or_path=str(llama), adapter_name_or_path=str(first))
    with pytest.raises(AlignError, match="the new one has `trainable_token_indices`"):
        check_joinable(section, LoraSection(trainable_token_indices=[1]), merge_adapter=False)


def test_an_untied_head_trains_the_rows_that_write_the_tokens(make_llama, tokenizer):
    untied = base(make_llama(tie=False))
    section = LoraSection(trainable_token_indices="control")
    model = get_peft_model(untied, lora_config(section, tokenizer=tokenizer, model=untied))
    trained = [n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n]
    assert sorted(name.split(".")[-4] for name in trained) == ["embed_tokens", "lm_head"]


def test_a_saved_adapter_names_the_base_as_the_user_did(llama, tmp_path):
    folder = adapter(llama, tmp_path / "adapter", 1)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (str(llama), "main")
    assert not (folder / "README.md").exists()


def test_a_reward_adapter_saves_its_head_whoever_asks():
    config = lora_config(LoraSection(lora_modules_to_save=["embed_tokens"]), reward=True)
    assert config is not None
    assert config.task_type == "SEQ_CLS"
    assert set(config.modules_to_save) == {"embed_tokens", "score"}
    assert lora_config(LoraSection(use_peft=False), reward=True) is None


def test_control_tokens_are_trained_through_a_tied_head(llama, tokenizer):
    section = LoraSection(trainable_token_indices="control")
    model = get_peft_model(base(llama), lora_config(section, tokenizer=tokenizer))
    expose_trained_head(model)
    assert model.get_base_model().get_output_embeddings().bias is None
    trained = {
        name: p for name, p in model.named_parameters() if p.requires_grad and "lora" not in name
    }
    assert [len(p) for p in trained.values()] == [len(control_token_ids(tokenizer))]
