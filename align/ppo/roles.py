"""The four models of PPO on one set of frozen weights: adapters that are switched, and small heads.

`policy` and `value` are trained, `reference` and `reward` are not. Where a role has an adapter, playing it means
to switch that adapter on; where it has weights of its own (full fine-tuning), these are used.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, TaskType
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from safetensors.torch import load_file
from torch import Tensor, nn

from align.errors import fail
from align.generation.sampler import unwrapped

Role = Literal["policy", "reference", "value", "reward"]

POLICY = "default"
"""PEFT's name of the policy's adapter, as in every other stage."""


class Roles(nn.Module):  # type: ignore[misc]
    """Who plays which part, and the heads of value and reward.

    Args:
        policy: the model that is trained: a PeftModel with the adapter `default`, or a full model.
        reference: a frozen copy of a full policy; None where the policy's adapter is switched off (or an adapter
            `ref` is switched on) instead.
        value: a model of its own for the value: a full one, or a PeftModel over the weights of a reward model; None
            where the value sits on the policy's weights.

    Attributes:
        reward_apart: why the reward model is no adapter on the shared base; None where it is one.
        reward_on_value: the weights under the value's adapter are the reward model.
    """

    def __init__(
        self,
        policy: Any,
        *,
        reference: nn.Module | None = None,
        value: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.reference = reference
        self.value = value
        self.reward_apart: str | None = None
        self.reward_on_value = False
        self.reward_head: Tensor | None
        self.register_buffer("reward_head", None, persistent=False)
        critic = policy if value is None else value
        size = int(unwrapped(critic).config.get_text_config().hidden_size)
        device, head = self.device, nn.Linear(size, 1)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        self.value_head = head.to(device=device, dtype=torch.float32)
        self._layers = {id(model): _switches(model) for model in (policy, critic)}

    @property
    def device(self) -> torch.device:
        """Where the policy is."""
        found: torch.device = next(self.policy.parameters()).device
        return found

    @property
    def quantization_method(self) -> Any:
        """Of the base, so that a trainer does not move quantized weights."""
        return getattr(unwrapped(self.policy), "quantization_method", None)

    @property
    def adapters(self) -> set[str]:
        """Names of the adapters on the shared base."""
        return set(self.policy.peft_config) if isinstance(self.policy, PeftModel) else set()

    def add_adapter(self, name: str, config: LoraConfig) -> None:
        """Put a new adapter on the shared base; the policy's stays the active one. `value` is trained."""
        self.policy.add_adapter(name, config)
        self.policy.set_adapter(POLICY)
        self._layers[id(self.policy)] = _switches(self.policy)
        trained_ones = {POLICY, "value"}
        for other in self.adapters:  # PEFT's own switching froze the others
            for parameter in self.adapter_parameters(other):
                parameter.requires_grad_(other in trained_ones)

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        """Weights of one adapter, in a fixed order."""
        return [
            parameter
            for key, parameter in self.policy.named_parameters()
            if f".{name}." in key or key.endswith(f".{name}")
        ]

    def copy_adapter(self, source: str, target: str) -> None:
        """Give one adapter of the shared base the weights of another of the same shape."""
        own, found = self.adapter_parameters(target), self.adapter_parameters(source)
        with torch.no_grad():
            for weight, other in zip(own, found, strict=True):
                weight.copy_(other)

    def policy_parameters(self) -> list[nn.Parameter]:
        """What the policy's optimizer group trains."""
        if isinstance(self.policy, PeftModel):
            return [p for p in self.adapter_parameters(POLICY) if p.requires_grad]
        return [p for p in self.policy.parameters() if p.requires_grad]

    def value_parameters(self) -> list[nn.Parameter]:
        """What the value's optimizer group trains: its head, and its adapter or model."""
        own: list[nn.Parameter] = []
        if "value" in self.adapters:
            own = self.adapter_parameters("value")
        elif self.value is not None:
            own = [p for p in self.value.parameters() if p.requires_grad]
        return [*own, *self.value_head.parameters()]

    @property
    def value_on_policy(self) -> bool:
        """Whether the value head reads the policy's own hidden states."""
        return self.value is None and "value" not in self.adapters

    @contextmanager
    def playing(self, role: Role) -> Iterator[Any]:
        """The model of a role, with its adapter active; what was active before is active again afterwards.

        `requires_grad` of no weight is touched, unlike in PEFT's own `set_adapter`.
        """
        model, adapter = self._seat(role)
        layers = self._layers.get(id(model), [])
        before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]
        try:
            for layer in layers:
                # Trained token rows fail where the active adapter has none.
                layer._disable_adapters = adapter is None or adapter not in _adapters_of(layer)
                if adapter is not None:
                    layer._active_adapter = [adapter]
            yield model
        finally:
            for layer, active, disabled in before:
                layer._active_adapter, layer._disable_adapters = active, disabled

    def _seat(self, role: Role) -> tuple[Any, str | None]:
        """The model that plays a role, and its adapter; None: the weights alone."""
        if role == "reference":
            return self.reference or self.policy, "ref" if "ref" in self.adapters else None
        if role == "value" and self.value is not None:
            return self.value, POLICY
        if role == "value":
            return self.policy, "value" if "value" in self.adapters else POLICY
        if role == "reward" and self.reward_on_value:
            return self.value, None
        return self.policy, POLICY if role == "policy" else role

    @property
    def shares_reward(self) -> bool:
        """Whether the reward model's weights are among these models."""
        return "reward" in self.adapters or self.reward_on_value

    def values(self, hidden: Tensor) -> Tensor:
        """Values of hidden states, shape [n, d] -> [n], float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            found: Tensor = self.value_head(hidden.float()).squeeze(-1)
        return found

    def rewards(self, hidden: Tensor) -> Tensor:
        """Rewards of the last hidden states of whole texts, shape [n, d] -> [n], float32."""
        assert self.reward_head is not None
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.float() @ self.reward_head.float()

    def start_value_from_reward(self, mean: float, deviation: float, weight: float = 1.0) -> None:
        """Let the value begin as the (normalized) reward model: its head, and its adapter if both have one.

        Args:
            mean, deviation: of the scores, which are the rewards times `weight`.
        """
        if self.reward_head is None:
            return
        with torch.no_grad():
            self.value_head.weight.copy_(self.reward_head.float()[None] * weight / deviation)
            self.value_head.bias.fill_(-mean / deviation)
        if "value" in self.adapters:
            self.copy_adapter("reward", "value")

    def trained_state(self) -> dict[str, Tensor]:
        """Every trained weight by name."""
        return {
            name: parameter.detach()
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        }

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Put back what `trained_state` gave; every name must be there on both sides."""
        own = self.trained_state()
        if own.keys() != state.keys():
            odd = sorted(own.keys() ^ state.keys())[:3]
            fail(f"the checkpoint trains other weights than this recipe: {', '.join(odd)}, ...")
        with torch.no_grad():
            for name, weight in state.items():
                own[name].copy_(weight)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **more: Any
    ) -> None:
        """Recompute activations of the trained models in their backward passes.

        Args:
            activation_checkpointing_kwargs: for torch's `checkpoint`.
            more: `every_n_layers` and `offload`, as transformers' models take them.
        """
        for model in (self.policy, self.value):
            if model is not None:
                unwrapped(model).activation_checkpointing_enable(
                    activation_checkpointing_kwargs=activation_checkpointing_kwargs, **more
                )
                if hasattr(model, "enable_input_require_grads"):
                    model.enable_input_require_grads()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **more: Any
    ) -> None:
        """The same by the name that transformers gives up in v6."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **more)

    @contextmanager
    def merged(self) -> Iterator[None]:
        """The policy's adapter folded into the weights, for drawing; the very same weights come back afterwards.

        Decoding is bound by small matrix products, and an adapter adds two to each. Costs one copy of the adapted
        weights while it lasts.
        """
        kept: list[tuple[nn.Parameter, Tensor]] = []
        layers = self._adapted()
        before = [layer._disable_adapters for layer in layers]
        try:
            for layer in layers:
                weight = _weight_under(layer)
                kept.append((weight, weight.data))
                weight.data = weight.data + layer.get_delta_weight(POLICY).to(weight.dtype)
            for layer in layers:
                layer._disable_adapters = True
            yield
        finally:
            for weight, data in kept:
                weight.data = data
            for layer, disabled in zip(layers, before, strict=True):
                layer._disable_adapters = disabled

    def can_merge(self) -> bool:
        """Whether `merged` gives the policy's own numbers: plain LoRA on float32 weights."""
        layers = self._adapted()
        if not layers or self.unmergeable is not None:
            return False
        return _weight_under(layers[0]).dtype is torch.float32

    @property
    def unmergeable(self) -> str | None:
        """Why the policy's adapter cannot be folded into its weights; None where it can, or where there is none."""
        if not isinstance(self.policy, PeftModel):
            return None
        layers = self._adapted()
        if self.policy.peft_config[POLICY].use_dora:
            return "the adapter is DoRA, which is no sum of two weights"
        kinds = (
            layer if isinstance(layer, ParamWrapper) else layer.get_base_layer() for layer in layers
        )
        if not all(isinstance(kind, ParamWrapper | nn.Linear) for kind in kinds):
            return "it adapts other layers than linear ones and experts"
        weights = [_weight_under(layer) for layer in layers]
        if not all(weight.is_floating_point() for weight in weights):
            return "the weights under it are quantized"
        inputs = unwrapped(self.policy).get_input_embeddings().weight
        if any(weight is inputs for weight in weights):
            return "it adapts an output head that is the input embedding too"
        return None

    def _adapted(self) -> list[Any]:
        """The layers with weights of the policy's adapter."""
        return [
            layer
            for layer in self._layers[id(self.policy)]
            if isinstance(layer, LoraLayer) and POLICY in _adapters_of(layer)
        ]


def _weight_under(layer: Any) -> nn.Parameter:
    """The base's weight that an adapted layer changes; of experts and routers a parameter of any name."""
    name = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
    found: nn.Parameter = getattr(layer.get_base_layer(), name)
    return found


def _switches(model: nn.Module) -> list[Any]:
    """The modules of a model in which an adapter is chosen."""
    kinds = BaseTunerLayer | AuxiliaryTrainingWrapper
    return [module for module in model.modules() if isinstance(module, kinds)]


def _adapters_of(layer: Any) -> set[str]:
    """The adapters that a layer has weights of."""
    wrapper = isinstance(layer, AuxiliaryTrainingWrapper)
    found: set[str] = layer._adapters if wrapper else layer._get_available_adapters()
    return found


def silence_dropout(model: nn.Module) -> None:
    """Switch dropout off for good: a ratio of probabilities must not be noise (arXiv 2403.17031, detail 7)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def add_reward_adapter(roles: Roles, folder: Path) -> str | None:
    """Put a reward model's adapter and its head on the policy's base, as the adapter `reward`.

    Returns:
        None, or why the adapter does not fit a language model's base as it is; nothing is changed then.
    """
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    state = load_file(folder / "adapter_model.safetensors")
    heads = {name: weight for name, weight in state.items() if ".score." in f".{name}"}
    body = {name: weight for name, weight in state.items() if name not in heads}
    # PEFT names both heads of classifiers, of which a language model's has `score`.
    others = set(config.get("modules_to_save") or ()) - {"score", "classifier"}
    head = next((weight for name, weight in heads.items() if name.endswith("weight")), None)
    if others or head is None or len(heads) != 1 or config.get("trainable_token_indices"):
        return "it trains more than low-rank adapters and a head"
    fields = {key: value for key, value in config.items() if key in LoraConfig.__dataclass_fields__}
    fields |= {"task_type": TaskType.CAUSAL_LM, "modules_to_save": None, "inference_mode": False}
    roles.add_adapter("reward", LoraConfig(**fields))
    if not _fill(roles.policy, body):
        roles.policy.delete_adapter("reward")
        return "its weights do not fit the language model's modules"
    roles.reward_head = head.reshape(-1).to(roles.device)
    return None


def _fill(policy: nn.Module, body: dict[str, Tensor]) -> bool:
    """Copy saved weights into the adapter `reward`; False, and nothing copied, where they do not fit.

    PEFT's own loading looks for trained token rows in every adapter of a model that has some.
    """
    own = {
        name.replace(".reward.", "."): weight
        for name, weight in policy.named_parameters()
        if ".reward." in name
    }
    # A magnitude (DoRA) is saved without its last name.
    found = {name if name in own else f"{name}.weight": weight for name, weight in body.items()}
    shapes = [{name: weight.shape for name, weight in one.items()} for one in (own, found)]
    if shapes[0] != shapes[1]:
        return False
    with torch.no_grad():
        for name, weight in found.items():
            own[name].copy_(weight)
    return True
