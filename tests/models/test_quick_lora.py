"""The quick forward pass of LoRA layers: PEFT's values and gradients, and PEFT's own pass wherever more is at work."""

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from align.models import quick_lora
from align.models.quick_lora import quicken


class Net(nn.Module):
    """Two layers, one with a bias, with what PEFT asks of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 5, bias=False)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def pair(**more) -> tuple[PeftModel, PeftModel]:
    """The same moved adapter twice: PEFT's own layers, and quick ones."""
    torch.manual_seed(0)
    settings = {"r": 3, "lora_alpha": 12, "target_modules": ["first", "second"]} | more
    slow = get_peft_model(Net(), LoraConfig(**settings))
    move(slow)
    quick = deepcopy(slow)
    assert quicken(quick) == 2
    return slow, quick


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()


@pytest.fixture
def calls(monkeypatch):
    """How many layers took the quick pass."""
    found = []
    original = quick_lora._LowRank.apply
    monkeypatch.setattr(
        quick_lora._LowRank, "apply", lambda *given: found.append(1) or original(*given)
    )
    return found


def outcome(model, x):
    """Output, gradient of the input, and every weight's gradient."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return y.detach(), x.grad, gradients


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6)])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"lora_alpha": 1}])
def test_values_and_gradients_are_peft_s(calls, shape, settings):
    slow, quick = pair(**settings)
    x = torch.randn(shape)
    assert_close(outcome(quick, x), outcome(slow, x), rtol=1e-5, atol=1e-6)
    assert len(calls) == 2
    assert outcome(slow, x)[2]


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    x, weight, bias = (
        torch.randn(3, 4).double(),
        torch.randn(5, 4).double(),
        torch.randn(5).double(),
    )
    a, b = torch.randn(2, 4).double().requires_grad_(), torch.randn(5, 2).double().requires_grad_()
    given = (x.requires_grad_(), weight, bias, a, b, 0.7)
    assert torch.autograd.gradcheck(quick_lora._LowRank.apply, given)


def test_a_slice_that_is_not_contiguous(calls):
    slow, quick = pair()
    x = torch.randn(6, 4, 3).transpose(0, 2)
    assert_close(quick(x), slow(x), rtol=1e-5, atol=1e-6)
    assert len(calls) == 2


def second_adapter(model):
    torch.manual_seed(1)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first", "second"]))
    move(model)


def both_on(model):
    second_adapter(model)
    model.base_model.set_adapter(["default", "other"])


def trained_base(model):
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.get_base_layer().requires_grad_(True)


def half_adapter(model):
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.lora_A.to(torch.bfloat16)
            module.lora_B.to(torch.bfloat16)


SLOW = {
    "dropout": ({"lora_dropout": 0.5}, lambda model: model.train()),
    "dora": ({"use_dora": True}, None),
    "trained bias": ({"lora_bias": True}, None),
    "two adapters": ({}, both_on),
    "disabled": ({}, lambda model: model.base_model.disable_adapter_layers()),
    "merged": ({}, lambda model: model.merge_adapter()),
    "trained base": ({}, trained_base),
    "other types": ({}, half_adapter),
}


@pytest.mark.parametrize("name", SLOW)
def test_peft_s_own_pass_is_used_where_more_is_at_work(calls, name):
    settings, prepare = SLOW[name]
    models = pair(**settings)
    found = []
    for model in models:
        if prepare:
            prepare(model)
        torch.manual_seed(5)
        found.append(model(torch.ones(3, 6)))
    assert_close(found[0], found[1], rtol=0, atol=0)
    assert not calls


def test_autocast_is_peft_s(calls):
    slow, quick = pair()
    x = torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = quick(x), slow(x)
    assert found.dtype is torch.bfloat16
    assert_close(found, wanted, rtol=0, atol=0)
    assert not calls


@pytest.mark.parametrize("part", ["lora_A.default", "lora_B.default", "base_layer"])
@pytest.mark.parametrize("hook", ["register_forward_pre_hook", "register_forward_hook"])
def test_hooked_parts_are_called(calls, part, hook):
    """ZeRO-3 brings a weight together in such a hook; read without it, it would be empty."""
    _, quick = pair()
    seen = []
    layer = next(module for module in quick.modules() if isinstance(module, LoraLinear))
    getattr(layer.get_submodule(part), hook)(lambda *given: seen.append(1))
    quick(torch.randn(3, 6))
    assert seen == [1]
    assert len(calls) == 1


def test_wrapped_parts_are_called(calls):
    """FSDP wraps the adapter's layers in modules of its own."""

    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.weight = nn.Parameter(torch.zeros(0))  # a shard

        def forward(self, x):
            return self.inner(x)

    slow, quick = pair()
    for module in quick.modules():
        if isinstance(module, LoraLinear):
            module.lora_A["default"] = Wrapped(module.lora_A["default"])
    x = torch.randn(3, 6)
    assert_close(quick(x), slow(x), rtol=0, atol=0)
    assert not calls


def test_dropout_that_is_off_is_quick_again(calls):
    slow, quick = pair(lora_dropout=0.5)
    x = torch.randn(3, 6)
    assert_close(quick.eval()(x), slow.eval()(x), rtol=1e-5, atol=1e-6)
    assert len(calls) == 2


def test_the_active_one_of_two_adapters_counts(calls):
    models = pair()
    x = torch.randn(3, 6)
    for model in models:
        second_adapter(model)
    for name in ("other", "default"):
        for model in models:
            model.set_adapter(name)
        assert_close(models[1](x), models[0](x), rtol=1e-5, atol=1e-6)
    assert len(calls) == 4


def test_a_deep_copy_uses_weights_of_its_own(calls):
    _, quick = pair()
    x = torch.randn(3, 6)
    before = quick(x)
    copy = deepcopy(quick)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.zero_()
    assert copy(x).abs().max() == 0
    assert torch.equal(quick(x), before)
    assert len(calls) == 6


def test_saving_merging_and_a_second_call_change_nothing(tmp_path):
    slow, quick = pair()
    assert slow.state_dict().keys() == quick.state_dict().keys()
    for model, name in ((slow, "slow"), (quick, "quick")):
        model.save_pretrained(tmp_path / name)
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("slow", "quick")]
    states = [load_file(file) for file in files]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    x = torch.randn(3, 6)
    loaded = PeftModel.from_pretrained(deepcopy(quick).unload(), tmp_path / "quick")
    assert_close(loaded(x), quick(x), rtol=1e-5, atol=1e-6)
    wanted = quick(x)
    assert quicken(quick) == 0
    assert_close(quick.merge_and_unload()(x), wanted, rtol=1e-5, atol=1e-6)
