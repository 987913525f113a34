"""What a model is made of: its parameters counted from config.json, for dense, MoE and latent-attention shapes.

The shapes of the herd and its neighbours are data (`families.json`, the keys of config.json), so a Hub
id is planned for without a network. A local folder's own config.json wins.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from align.config.suggest import nearest
from align.errors import fail

FAMILIES = Path(__file__).with_name("families.json")

MLP = ("gate_proj", "up_proj", "down_proj")

BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "float8": 1.0, "int8": 1.0, "int4": 0.5}
"""Bytes per parameter of plain number formats."""


@dataclass(frozen=True)
class Linear:
    """A kind of linear layer of one decoder block."""

    name: str
    inputs: int
    outputs: int
    count: int = 1
    """How many of it a block has (experts)."""
    fused: bool = False
    """Experts are one three-dimensional parameter in transformers 5, which bitsandbytes, looking for
    linear layers, passes by; PEFT adapts each expert."""
    doubled: bool = False
    """Two layers in one, which PEFT gives twice the rank."""

    def adapter(self, rank: int) -> int:
        """Parameters of a LoRA adapter on it."""
        return rank * (1 + self.doubled) * (self.inputs + self.outputs) * self.count

    @property
    def size(self) -> int:
        return self.inputs * self.outputs * self.count


@dataclass(frozen=True)
class Shape:
    """Numbers of a causal language model; widths in elements."""

    name: str
    kind: str
    """transformers' `model_type`."""
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    positions: int
    config: Mapping[str, Any]
    """The config.json it was read from."""
    experts: int = 0
    active_experts: int = 0
    dense_layers: int = 0
    """MoE only: first blocks without experts."""

    @property
    def queries(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads together."""
        return self.kv_heads * self.head_dim

    @property
    def embedding(self) -> int:
        """Parameters of the embedding (and, untied, of the head again)."""
        return self.vocab * self.hidden

    @property
    def embeddings(self) -> int:
        """Parameters of embedding and head together."""
        return self.embedding * (1 if self.tied else 2)

    @property
    def latent(self) -> bool:
        """Whether attention keeps a compressed latent (DeepSeek)."""
        return bool(self.config.get("kv_lora_rank"))

    def block(self, layer: int = 0) -> list[Linear]:
        """The linear layers of a decoder block."""
        return [*self._attention(), *self._mlp(layer)]

    def _attention(self) -> Iterator[Linear]:
        hidden, queries, keys = self.hidden, self.queries, self.keys
        if self.latent:
            yield from self._latent_attention()
        elif self.kind in ("phi3", "phi4"):
            yield Linear("qkv_proj", hidden, queries + 2 * keys)
            yield Linear("o_proj", queries, hidden)
        else:
            yield Linear("q_proj", hidden, queries)
            yield Linear("k_proj", hidden, keys)
            yield Linear("v_proj", hidden, keys)
            yield Linear("o_proj", queries, hidden)

    def _latent_attention(self) -> Iterator[Linear]:
        """DeepSeek-V2/V3 (arXiv 2412.19437, section 2.1.1)."""
        get, hidden, heads = self.config.__getitem__, self.hidden, self.heads
        rope, plain, values = get("qk_rope_head_dim"), get("qk_nope_head_dim"), get("v_head_dim")
        rank = self.config.get("q_lora_rank")
        if rank:
            yield Linear("q_a_proj", hidden, rank)
            yield Linear("q_b_proj", rank, heads * (plain + rope))
        else:
            yield Linear("q_proj", hidden, heads * (plain + rope))
        yield Linear("kv_a_proj_with_mqa", hidden, get("kv_lora_rank") + rope)
        yield Linear("kv_b_proj", get("kv_lora_rank"), heads * (plain + values))
        yield Linear("o_proj", heads * values, hidden)

    def _mlp(self, layer: int) -> Iterator[Linear]:
        hidden, inner = self.hidden, self.intermediate
        if self.experts and layer >= self.dense_layers:
            inner = int(self.config.get("moe_intermediate_size") or inner)
            yield Linear("experts", hidden, 2 * inner, self.experts, fused=True, doubled=True)
            yield Linear("experts", inner, hidden, self.experts, fused=True)
            yield Linear("router", hidden, self.experts, fused=True)
            shared = int(self.config.get("n_shared_experts") or 0) * inner
        else:
            shared = inner
        if shared and self.kind in ("phi3", "phi4"):
            yield Linear("gate_up_proj", hidden, 2 * shared)
            yield Linear("down_proj", shared, hidden)
        elif shared:
            yield Linear("gate_proj", hidden, shared)
            yield Linear("up_proj", hidden, shared)
            yield Linear("down_proj", shared, hidden)

    def without_head(self) -> "Shape":
        """The shape of a reward model on it: the language head is left out."""
        return replace(self, tied=True)

    @cached_property
    def linear(self) -> int:
        """Parameters in linear layers of all blocks that PEFT and bitsandbytes reach."""
        return sum(one.size for one in self._all() if not one.fused)

    @cached_property
    def fused(self) -> int:
        """Parameters of experts and routers."""
        return sum(one.size for one in self._all() if one.fused)

    def _all(self) -> Iterator[Linear]:
        for layer in range(self.layers):
            yield from self.block(layer)

    @property
    def small(self) -> int:
        """Norms and biases."""
        norms = {"gemma2": 4, "gemma3_text": 4}.get(self.kind, 2) * self.hidden
        if self.kind == "qwen3":
            norms += 2 * self.head_dim
        if self.kind == "qwen2" or self.config.get("attention_bias"):
            norms += self.queries + 2 * self.keys
        if self.latent:
            norms += int(self.config.get("q_lora_rank") or 0) + int(self.config["kv_lora_rank"])
        return self.layers * norms + self.hidden

    @property
    def parameters(self) -> int:
        """All parameters of the language model."""
        return self.linear + self.fused + self.small + self.embeddings

    @property
    def active(self) -> int:
        """Parameters that a token meets in the blocks (of experts, the chosen ones)."""
        share = self.active_experts / self.experts if self.experts else 0
        return self.linear + round(self.fused * share)

    @property
    def kv_bytes(self) -> int:
        """Bytes per token of a 16-bit KV cache: K and V of the key/value heads, every layer.

        Latent attention is counted as transformers keeps it, K and V of every head unpacked.
        """
        if self.latent:
            get = self.config.__getitem__
            width = get("qk_nope_head_dim") + get("qk_rope_head_dim") + get("v_head_dim")
            return 2 * self.layers * self.heads * int(width)
        return 2 * 2 * self.layers * self.keys

    def adapter(self, rank: int, targets: str | list[str]) -> int:
        """Parameters of a LoRA adapter: rank times (inputs + outputs) of every layer it sits on.

        With experts, PEFT's `all-linear` takes attention, experts and router, and neither the shared
        experts nor the MLP of first dense blocks.
        """
        return sum(one.adapter(rank) for one in self._all() if self._targeted(one, targets))

    def _targeted(self, one: Linear, targets: str | list[str]) -> bool:
        if targets == "all-linear":
            return one.fused or not (self.experts and one.name in MLP)
        if isinstance(targets, str):
            try:
                return re.fullmatch(rf"(?:.*\.)?(?:{targets})", one.name) is not None
            except re.error:
                return False
        return any(name.rpartition(".")[2] == one.name for name in targets)


REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def shape_of(name: str, config: Mapping[str, Any]) -> Shape:
    """The shape that a config.json describes.

    Raises:
        AlignError: it lacks a width that every causal language model of this form has.
    """
    text = config.get("text_config")
    config = {**config, **text} if isinstance(text, Mapping) else config
    missing = [key for key in REQUIRED if not isinstance(config.get(key), int)]
    if missing or not isinstance(config.get("intermediate_size"), int):
        lacks = ", ".join(missing or ["intermediate_size"])
        fail(
            f"config.json has no `{lacks}`",
            where=name,
            hint="the planner knows decoder models with the keys of Llama, Mixtral and DeepSeek",
        )
    heads = int(config["num_attention_heads"])
    experts = int(config.get("num_local_experts") or config.get("n_routed_experts") or 0)
    return Shape(
        name=name,
        kind=str(config.get("model_type", "llama")),
        hidden=int(config["hidden_size"]),
        layers=int(config["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
        intermediate=int(config["intermediate_size"]),
        vocab=int(config["vocab_size"]),
        tied=bool(config.get("tie_word_embeddings", False)),
        positions=int(config.get("max_position_embeddings") or 0),
        config=config,
        experts=experts,
        active_experts=int(config.get("num_experts_per_tok") or 0) if experts else 0,
        dense_layers=int(config.get("first_k_dense_replace") or 0) if experts else 0,
    )


@cache
def families() -> dict[str, dict[str, Any]]:
    """Family -> its Hub ids and the shape keys of its config.json."""
    found: dict[str, dict[str, Any]] = json.loads(FAMILIES.read_text(encoding="utf-8"))
    return found


def known(name: str) -> Shape | None:
    """The shape of a Hub id or family name that is known offline; None for others."""
    wanted = name.lower()
    for family, facts in families().items():
        if wanted == family or wanted in (one.lower() for one in facts["ids"]):
            return shape_of(name, facts["config"])
    return None


def find_shape(name: str) -> Shape:
    """The shape of a model folder (its config.json) or of a Hub id that is known offline.

    Raises:
        AlignError: neither; the hint says how to plan all the same.
    """
    file = Path(name).expanduser() / "config.json"
    if file.is_file():
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            fail(f"cannot be read as JSON ({error})", where=str(file))
        if not isinstance(config, dict):
            fail("does not hold a JSON object", where=str(file))
        return shape_of(name, config)
    found = known(name)
    if found is not None:
        return found
    ids = [one for facts in families().values() for one in facts["ids"]]
    close = nearest(name, [*families(), *ids])
    hint = f"did you mean `{close}`? " if close else ""
    fail(
        "its shape is not known offline",
        where=name,
        hint=f"{hint}Name a folder that holds its config.json, or a model of the same shape: "
        "`--set model.model_name_or_path=llama-3.1-8b`",
    )
