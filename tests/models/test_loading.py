"""A wrong folder is refused with the way out before any weight is loaded; adapters meet their base."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from align.config.sections import LoraSection, ModelSection
from align.errors import AlignError
from align.models.adapters import lora_config, save_adapter
from align.models.identity import look_at, write_base_identity
from align.models.loading import (
    check_model,
    load_any_policy,
    load_policy,
    load_reward_model,
    load_reward_start,
    resolve_dtype,
)

IDS = torch.tensor([[0, 2, 40, 50, 60, 70, 4]])


@pytest.fixture(scope="module")
def adapter(llama: Path, tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    model = get_peft_model(base, lora_config(LoraSection(lora_r=4)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    save_adapter(model, folder, base=str(llama), revision="main")
    write_base_identity(folder, str(llama), model.config.to_dict())
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reward_model(llama: Path, tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def section(path: Path | str, **more) -> ModelSection:
    return ModelSection(model_name_or_path=str(path), **more)


def test_an_adapter_where_a_base_is_needed(adapter, llama):
    with pytest.raises(AlignError, match="is a LoRA adapter") as caught:
        load_policy(section(adapter))
    assert f"adapter_name_or_path: {adapter} and model_name_or_path: {llama}" in str(caught.value)


def test_a_base_where_an_adapter_is_needed(llama):
    with pytest.raises(AlignError, match="is a full model, but an adapter is needed"):
        load_policy(section(llama, adapter_name_or_path=str(llama)))


def test_a_reward_model_where_a_policy_is_needed_and_the_reverse(reward_model, llama):
    with pytest.raises(AlignError, match="is a reward model, but a policy"):
        load_policy(section(reward_model))
    with pytest.raises(AlignError, match="is a reward model, but a policy"):
        load_any_policy(str(reward_model))
    with pytest.raises(AlignError, match=r"is a policy .* but a reward model is needed"):
        load_reward_model(str(llama))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "neither config.json nor adapter_config.json"),
        ({"config.json": "{"}, "cannot be read as JSON"),
        ({"config.json": '{"auto_map": {"AutoModel": "x.py"}}'}, "align runs none"),
        (
            {"config.json": '{"model_type": "own", "auto_map": {"AutoModel": "x.Own"}}'},
            "align runs none",
        ),
    ],
)
def test_a_folder_that_is_no_model(tmp_path, content, said):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(AlignError, match=said):
        load_policy(section(tmp_path))


def test_a_run_folder_points_to_its_artifact(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "artifact")
    with pytest.raises(AlignError, match=r"did you mean `.*artifact`"):
        load_any_policy(str(tmp_path))


def test_a_folder_that_is_not_there():
    with pytest.raises(AlignError, match="no such folder"):
        load_policy(section("./nowhere"))


def test_pickle_weights_are_not_read(llama, tmp_path):
    shutil.copy(llama / "config.json", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(llama)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(AlignError, match="no safetensors"):
        load_policy(section(tmp_path))


def test_stack_folds_and_continue_keeps_the_adapter(adapter, llama):
    named = section(llama, adapter_name_or_path=str(adapter))
    folded = load_policy(named, trained=True)
    kept = load_policy(named.model_copy(update={"adapter_mode": "continue"}), trained=True)
    torch.testing.assert_close(folded(IDS).logits, kept(IDS).logits, rtol=1e-4, atol=1e-4)
    assert any(p.requires_grad for n, p in kept.named_parameters() if "lora" in n)
    assert not hasattr(folded, "peft_config")


def test_any_policy_finds_the_base_of_an_adapter(adapter, llama):
    model, tokenizer = load_any_policy(str(adapter))
    expected = load_policy(section(llama, adapter_name_or_path=str(adapter)))
    torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, rtol=1e-4, atol=1e-4)
    assert tokenizer.chat_template


def test_an_adapter_refuses_other_weights_of_the_same_shape(adapter, make_llama):
    other = make_llama(seed=9)
    with pytest.raises(AlignError, match="was trained on other weights"):
        load_policy(section(other, adapter_name_or_path=str(adapter)))


def test_an_adapter_refuses_other_shapes(adapter, make_llama):
    other = make_llama(seed=0, layers=3)
    with pytest.raises(AlignError, match="num_hidden_layers 2"):
        load_policy(section(other, adapter_name_or_path=str(adapter)))


def test_a_reward_model_starts_from_the_folded_policy(adapter, llama):
    torch.manual_seed(0)
    model = load_reward_start(section(llama, adapter_name_or_path=str(adapter)), train_base=False)
    policy = load_policy(section(llama, adapter_name_or_path=str(adapter)))
    for name, weight in policy.model.state_dict().items():
        torch.testing.assert_close(model.model.state_dict()[name], weight)
    assert model.config.num_labels == 1


def test_two_labels_are_no_reward(llama, tokenizer, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(llama, num_labels=2).save_pretrained(
        tmp_path
    )
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(AlignError, match="2 labels"):
        load_reward_model(str(tmp_path))


def test_dtype_of_frozen_and_of_trained_weights():
    assert resolve_dtype("auto", "bfloat16", trained=False) is torch.bfloat16
    assert resolve_dtype("auto", "bfloat16", trained=True) is torch.float32
    assert resolve_dtype("bfloat16", "float32", trained=True) is torch.bfloat16
    if not torch.cuda.is_available():
        assert resolve_dtype("auto", "float16", trained=False) is torch.float32


def test_identity_file_is_readable(adapter):
    identity = json.loads((adapter / "base_identity.json").read_text())
    assert identity["shape"]["num_hidden_layers"] == 2
    assert len(identity["weights_sha256"]) == 64


def test_a_hub_that_cannot_be_asked_is_said_so():
    with pytest.raises(AlignError, match="the Hub cannot be asked"):
        look_at("no-such-org/no-such-model")


def test_a_model_is_checked_without_its_weights(adapter, llama, tmp_path):
    shutil.copy(llama / "config.json", tmp_path)
    assert check_model(section(tmp_path)).kind == "policy"
    with pytest.raises(AlignError, match="is a LoRA adapter"):
        check_model(section(adapter))
    with pytest.raises(AlignError, match="is a full model, but an adapter is needed"):
        check_model(section(tmp_path, adapter_name_or_path=str(llama)))
