"""Three small plugins of unlike kind, and faults to plant in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from llmfw import (
    Attention,
    DecoderSpec,
    GatedMLP,
    Layer,
    Linear,
    ModelConfig,
    StockDecoderForCausalLM,
    WeightMap,
    hookimpl,
)
from llmfw.plugins import register_local, unregister_local
from llmfw.weights import load_into

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
}

SpecOf = Callable[[Any], DecoderSpec]
MakeLayer = Callable[[str, str, ModelConfig[Any], int | None, Mapping[str, Any]], nn.Module | None]


@dataclass(frozen=True)
class Plugin:
    """A stock decoder with a spec, a weight map and perhaps layers of its own."""

    spec_of: SpecOf
    weights: WeightMap = field(default_factory=WeightMap)
    make_layer: MakeLayer | None = None
    model_class: type[StockDecoderForCausalLM] = StockDecoderForCausalLM
    tiny_configs: Mapping[str, Any] = field(default_factory=dict)

    @hookimpl
    def llmfw_model(self, model_config: ModelConfig[Any]) -> StockDecoderForCausalLM:
        return self.model_class(model_config, self.spec_of(model_config.pretrained_config))

    @hookimpl
    def llmfw_weight_map(self) -> WeightMap:
        return self.weights

    @hookimpl
    def llmfw_layer(self, kind, role, model_config, layer_idx, spec):
        if self.make_layer is None:
            return None
        return self.make_layer(kind, role, model_config, layer_idx, spec)


class LoadsByHand(StockDecoderForCausalLM):
    """Its author fills it himself, and takes no bias of a projection."""

    def load_weights(self, weights):
        taken = [name for name in weights if not name.endswith("_proj.bias")]
        load_into(self, {name: weights[name] for name in taken})


# --- Rotary embedding, RMS norms, gated MLP, and four scales


def scaled_spec(config: Any) -> DecoderSpec:
    return DecoderSpec.from_config(
        config,
        attn_scale=config.attention_multiplier,
        embed_scale=config.embedding_multiplier,
        residual_scale=config.residual_multiplier,
        logit_scale=1.0 / config.logits_scaling,
    )


SCALED = Plugin(scaled_spec)
SCALED_CONFIG = {
    **SIZES,
    "model_type": "granite",
    "attention_bias": True,
    "mlp_bias": True,
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.5,
    "residual_multiplier": 0.4,
    "logits_scaling": 0.5,
}

# --- The same with windows and heads of an own size; norms with an offset


WINDOWED = Plugin(DecoderSpec.from_config)
WINDOWED_CONFIG = {**SIZES, "model_type": "mistral", "head_dim": 16, "sliding_window": 9}

OFFSET = Plugin(
    lambda config: DecoderSpec.from_config(
        config, norm_offset=1.0, embed_scale=config.hidden_size**0.5
    )
)
OFFSET_CONFIG = {**SIZES, "model_type": "gemma", "head_dim": 16}

# --- Learned positions, layer norms with bias, plain MLP, fused and transposed projections


def learned_spec(config: Any) -> DecoderSpec:
    return DecoderSpec.from_config(
        config,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        gated=False,
        learned_positions=config.n_positions,
        intermediate_size=config.n_inner,
        rope=None,
    )


LEARNED_NAMES = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.wpe.weight": "model.embed_positions.weight",
    "transformer.h.{i}.ln_1.{p}": "model.layers.{i}.input_layernorm.{p}",
    "transformer.h.{i}.ln_2.{p}": "model.layers.{i}.post_attention_layernorm.{p}",
    "transformer.h.{i}.attn.c_proj.{p}": "model.layers.{i}.self_attn.o_proj.{p}",
    "transformer.h.{i}.mlp.c_fc.{p}": "model.layers.{i}.mlp.up_proj.{p}",
    "transformer.h.{i}.mlp.c_proj.{p}": "model.layers.{i}.mlp.down_proj.{p}",
    "transformer.ln_f.{p}": "model.norm.{p}",
}


def learned_weights(order: str = "qkv", transposed: tuple[str, ...] = ("attn", "mlp")) -> WeightMap:
    weights = WeightMap()
    for block in transposed:
        weights = weights.transpose(f"transformer.h.{{i}}.{block}.{{name}}.weight")
    parts = [f"model.layers.{{i}}.self_attn.{each}_proj.{{p}}" for each in order]
    return weights.split("transformer.h.{i}.attn.c_attn.{p}", parts).rename(LEARNED_NAMES)


LEARNED = Plugin(learned_spec, learned_weights())
LEARNED_CONFIG = {
    "model_type": "gpt2",
    "vocab_size": 96,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 48,
    "n_positions": 96,
}


# --- A router and experts, written plainly


class ExpertsMLP(Layer):
    """Each token goes to the best few experts, weighted by the router."""

    def __init__(self, config: ModelConfig[Any], layer_idx: int | None, renormalise: bool) -> None:
        super().__init__()
        facts = config.pretrained_config
        self.top_k, self.renormalise = facts.num_experts_per_tok, renormalise
        self.gate = Linear(facts.hidden_size, facts.num_local_experts, bias=False)
        self.experts = nn.ModuleList(
            GatedMLP(
                hidden_size=facts.hidden_size,
                intermediate_size=facts.intermediate_size,
                config=config,
                layer_idx=layer_idx,
            )
            for _ in range(facts.num_local_experts)
        )

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        chances = self.gate(x).float().softmax(-1)
        weights, chosen = chances.topk(self.top_k, dim=-1)  # [tokens, top_k]
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            share = (weights * (chosen == number)).sum(-1, keepdim=True)
            out += expert(x) * share.to(x.dtype)
        return out


def experts_layer(renormalise: bool = True) -> MakeLayer:
    def make(kind, role, model_config, layer_idx, spec):
        return ExpertsMLP(model_config, layer_idx, renormalise) if kind == "mlp" else None

    return make


def experts_weights(gate: str = "w1", up: str = "w3", shift: int = 0, count: int = 4) -> WeightMap:
    there, here = "model.layers.{i}.block_sparse_moe", "model.layers.{i}.mlp"
    weights = WeightMap().rename(f"{there}.gate.weight", f"{here}.gate.weight")
    names = {gate: "gate_proj", up: "up_proj", "w2": "down_proj"}
    for number in range(count):
        target = (number + shift) % count
        for old, new in names.items():
            weights = weights.rename(
                f"{there}.experts.{number}.{old}.weight", f"{here}.experts.{target}.{new}.weight"
            )
    return weights


EXPERTS = Plugin(DecoderSpec.from_config, experts_weights(), experts_layer())
EXPERTS_CONFIG = {**SIZES, "model_type": "mixtral", "num_local_experts": 4}


# --- Faults that show while the model runs


class AttentionThat(Attention):
    """Attention with something done to it before it attends."""

    def attend(self, qkv, position_ids, attn_metadata):
        return super().attend(*self.spoil(qkv, position_ids, attn_metadata))


class StaleSlot(AttentionThat):
    """A decoded token's K and V go to the slot before its own."""

    def spoil(self, qkv, position_ids, metadata):
        view = metadata.groups[0]
        if max(metadata.query_lens) == 1:
            view = replace(view, slots=(view.slots - 1).clamp_min(0))
        return qkv, position_ids, replace(metadata, groups=(view, *metadata.groups[1:]))


class LateDecode(AttentionThat):
    """A decoded token is rotated as if it stood one further."""

    def spoil(self, qkv, position_ids, metadata):
        return qkv, position_ids + (max(metadata.query_lens) == 1), metadata


class ForgetsCache(AttentionThat):
    """A chunk sees the last blocks of its request alone, not all that was cached before."""

    def spoil(self, qkv, position_ids, metadata):
        view = metadata.groups[0]
        lengths = list(zip(metadata.query_lens, metadata.kv_lens, strict=True))
        gone = [(kv - new) // view.block_size if new > 1 else 0 for new, kv in lengths]
        tables = [row.roll(-n) for row, n in zip(view.block_tables, gone, strict=True)]
        kept = tuple(kv - n * view.block_size for (_, kv), n in zip(lengths, gone, strict=True))
        view = replace(view, block_tables=torch.stack(tables))
        return qkv, position_ids, replace(metadata, kv_lens=kept, groups=(view,))


class MixesRequests(AttentionThat):
    """In a batch of several requests the positions are counted through all of them."""

    def spoil(self, qkv, position_ids, metadata):
        cached = [kv > new for kv, new in zip(metadata.kv_lens, metadata.query_lens, strict=True)]
        if len(cached) == 1 or not any(cached):
            return qkv, position_ids, metadata
        return qkv, position_ids + torch.arange(len(position_ids)) % 2, metadata


class AsksForParts(GatedMLP):
    """Builds a part through the hooks while it runs."""

    def __init__(self, config, **spec):
        super().__init__(config=config, **spec)
        self.asked = config

    def forward(self, x, **kwargs):
        self.asked.make("norm", "unused", hidden_size=4)
        return super().forward(x, **kwargs)


def layer_with(kind_wanted: str, make: Callable[..., nn.Module], only_layer: int | None = None):
    def make_layer(kind, role, model_config, layer_idx, spec):
        if kind != kind_wanted or (only_layer is not None and layer_idx != only_layer):
            return None
        arguments = dict(spec)
        arguments.pop("gated", None)
        return make(config=model_config, layer_idx=layer_idx, **arguments)

    return make_layer


@dataclass(frozen=True)
class Kind:
    """A plugin, the architecture it is registered under and its tiny configuration."""

    architecture: str
    plugin: Plugin
    config: dict[str, Any]


KINDS = {
    "scaled": Kind("PlantedScaledForCausalLM", SCALED, SCALED_CONFIG),
    "windowed": Kind("PlantedWindowedForCausalLM", WINDOWED, WINDOWED_CONFIG),
    "offset": Kind("PlantedOffsetForCausalLM", OFFSET, OFFSET_CONFIG),
    "learned": Kind("PlantedLearnedForCausalLM", LEARNED, LEARNED_CONFIG),
    "experts": Kind("PlantedExpertsForCausalLM", EXPERTS, EXPERTS_CONFIG),
}


class planted:
    """`with planted(kind, plugin):` that plugin serves the kind's architecture."""

    def __init__(self, kind: Kind, plugin: object) -> None:
        self.kind, self.plugin = kind, plugin

    def __enter__(self) -> None:
        name, plugin = self.kind.architecture, self.plugin
        if isinstance(plugin, Plugin):
            plugin = replace(plugin, tiny_configs={name: self.kind.config})
        register_local(name, plugin, f"planted {name}")

    def __exit__(self, *exc_info: object) -> None:
        unregister_local(self.kind.architecture)
