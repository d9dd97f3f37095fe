"""The faults that authors make, each planted in a sound plugin, and what must be said of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from contract_plugins import (
    EXPERTS,
    LEARNED,
    OFFSET,
    SCALED,
    WINDOWED,
    AsksForParts,
    ForgetsCache,
    LateDecode,
    LoadsByHand,
    MixesRequests,
    Plugin,
    SpecOf,
    StaleSlot,
    experts_layer,
    experts_weights,
    layer_with,
    learned_weights,
)
from llmfw import LayerNorm, WeightMap


@dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        kind: Which of `contract_plugins.KINDS` it is planted in.
        plugin: The plugin with the fault.
        check: The first check of the contract that fails.
        words: What its failure says.
        module: The first diverging module that verify names; None where no number changes.
        stage: The stage there.
    """

    kind: str
    plugin: Plugin
    check: str
    words: tuple[str, ...]
    module: str | None = None
    stage: str | None = None


def with_spec(plugin: Plugin, **changes: Any) -> Plugin:
    spec_of: SpecOf = plugin.spec_of
    return replace(plugin, spec_of=lambda config: spec_of(config).replace(**changes))


def with_rope(plugin: Plugin, **changes: Any) -> Plugin:
    def spec_of(config: Any):
        spec = plugin.spec_of(config)
        return spec.replace(rope=replace(spec.rope, **changes))

    return replace(plugin, spec_of=spec_of)


def with_layer(plugin: Plugin, kind: str, make: Any, only: int | None = None) -> Plugin:
    return replace(plugin, make_layer=layer_with(kind, make, only))


def norm_with(kind: type, **changes: Any):
    """A norm with other constants, for the second layer alone."""

    def make(config, layer_idx, norm_kind="rms", **spec):
        spec.pop("offset" if kind is LayerNorm else "bias", None)
        return kind(**{**spec, **changes})

    return make


LAYER = "model.layers.{i}"
ATTENTION, MLP = f"{LAYER}.self_attn", f"{LAYER}.mlp"
SWAPPED_QK = WeightMap().rename(
    {
        f"{ATTENTION}.q_proj.{{p}}": f"{ATTENTION}.tmp.{{p}}",
        f"{ATTENTION}.k_proj.{{p}}": f"{ATTENTION}.q_proj.{{p}}",
        f"{ATTENTION}.tmp.{{p}}": f"{ATTENTION}.k_proj.{{p}}",
    }
)
SWAPPED_GATE_UP = WeightMap().rename(
    {
        f"{MLP}.gate_proj.{{p}}": f"{MLP}.tmp.{{p}}",
        f"{MLP}.up_proj.{{p}}": f"{MLP}.gate_proj.{{p}}",
        f"{MLP}.tmp.{{p}}": f"{MLP}.up_proj.{{p}}",
    }
)
IGNORED_BIAS = WeightMap().ignore(f"{ATTENTION}.{{x}}_proj.bias", "not needed")

A0, M0, L0 = "model.layers.0.self_attn", "model.layers.0.mlp", "model.layers.0"

FAULTS = {
    "wrong rope base": Fault(
        "scaled", with_rope(SCALED, theta=500.0), "matches_reference",
        ("prefill logits", A0, "q after rope", "rope base"), A0, "q",
    ),
    "wrong rope layout": Fault(
        "windowed", with_rope(WINDOWED, interleaved=True), "matches_reference",
        ("q after rope", "pair layout"), A0, "q",
    ),
    "swapped q and k": Fault(
        "windowed",
        replace(
            with_spec(WINDOWED, num_kv_heads=2), weights=SWAPPED_QK
        ), "accounts_for_every_tensor", ("q_proj.weight", "[32, 32]", "[64, 32]"),
    ),
    "swapped q and k of one shape": Fault(
        "learned", replace(LEARNED, weights=learned_weights("kqv")), "matches_reference",
        (A0, "q after rope", "order"), A0, "q",
    ),
    "swapped k and v": Fault(
        "learned", replace(LEARNED, weights=learned_weights("qvk")), "matches_reference",
        (A0, "k after rope"), A0, "k",
    ),
    "untransposed projection": Fault(
        "learned", replace(LEARNED, weights=learned_weights(transposed=("mlp",))),
        "accounts_for_every_tensor", ("q_proj.weight", "does not split", "c_attn"),
    ),
    "missing bias": Fault(
        "scaled", with_spec(SCALED, qkv_bias=False), "accounts_for_every_tensor",
        ("q_proj.bias", "nothing takes this tensor", "weight map"),
    ),
    "tensor ignored by mistake": Fault(
        "scaled", replace(with_spec(SCALED, qkv_bias=False, o_bias=False), weights=IGNORED_BIAS),
        "accounts_for_every_tensor", ("is ignored ('not needed')", "_proj.bias", "the reference"),
        f"{A0}.qkv_proj", "output",
    ),
    "tensor that an author's own loader never reads": Fault(
        "scaled",
        replace(
            with_spec(SCALED, qkv_bias=False, o_bias=False, mlp_bias=False),
            model_class=LoadsByHand,
        ),
        "accounts_for_every_tensor", ("never read", "_proj.bias", "load_weights of LoadsByHand"),
    ),
    "parameter that nothing fills": Fault(
        "windowed", with_spec(WINDOWED, qk_norm=True), "accounts_for_every_tensor",
        ("q_norm.weight", "no tensor fills it"),
    ),
    "wrong eps": Fault(
        "scaled", with_spec(SCALED, norm_eps=2e-6), "matches_reference",
        ("faint weights", "input_layernorm", "eps"), f"{L0}.input_layernorm", "output",
    ),
    "wrong eps in one layer norm": Fault(
        "learned", with_layer(LEARNED, "norm", norm_with(LayerNorm, eps=1e-3), only=1),
        "matches_reference", ("model.layers.1.input_layernorm", "ln_1", "eps"),
        "model.layers.1.input_layernorm", "output",
    ),
    "forgotten embedding scale": Fault(
        "scaled", with_spec(SCALED, embed_scale=None), "matches_reference",
        ("embedding scale", "after model.embed_tokens"), "model", "input",
    ),
    "wrong attention scale": Fault(
        "scaled", with_spec(SCALED, attn_scale=None), "matches_reference",
        ("q after rope, times its scale", "attention scale"), A0, "q",
    ),
    "missing residual scale": Fault(
        "scaled", with_spec(SCALED, residual_scale=None), "matches_reference",
        ("post_attention_layernorm", "residual", f"after {A0}"), L0, "input",
    ),
    "forgotten logit scale": Fault(
        "scaled", with_spec(SCALED, logit_scale=None), "matches_reference",
        ("after the last module", "logit scale"), "", "output",
    ),
    "wrong norm offset": Fault(
        "offset", with_spec(OFFSET, norm_offset=0.0), "matches_reference",
        ("input_layernorm", "offset"), f"{L0}.input_layernorm", "output",
    ),
    "wrong activation": Fault(
        "scaled", with_spec(SCALED, activation="gelu"), "matches_reference",
        (M0, "after model.layers.0.mlp.gate_up_proj", "activation"), M0, "input",
    ),
    "nearly right activation": Fault(
        "learned", with_spec(LEARNED, activation="gelu"), "matches_reference",
        (M0, "activation"), M0, "input",
    ),
    "unfused gate and up in the wrong order": Fault(
        "scaled", replace(SCALED, weights=SWAPPED_GATE_UP), "matches_reference",
        (M0, "activation"), M0, "input",
    ),
    "gate and up of the experts swapped": Fault(
        "experts", replace(EXPERTS, weights=experts_weights("w3", "w1")), "matches_reference",
        (M0, "reference: model.layers.0.mlp"), M0, "output",
    ),
    "experts in another order": Fault(
        "experts", replace(EXPERTS, weights=experts_weights(shift=1)), "matches_reference",
        (M0,), M0, "output",
    ),
    "router weights not renormalised": Fault(
        "experts", replace(EXPERTS, make_layer=experts_layer(renormalise=False)),
        "matches_reference", (M0,), M0, "output",
    ),
    "off-by-one position": Fault(
        "learned", with_spec(LEARNED, position_offset=1, learned_positions=95), "matches_reference",
        ("model.embed_positions", "transformer.wpe"), "model.embed_positions", "output",
    ),
    "off-by-one position while decoding": Fault(
        "scaled", with_layer(SCALED, "attention", LateDecode), "step_by_step",
        ("decoding step by step", A0, "q after rope", "positions"), A0, "q",
    ),
    "stale KV slot": Fault(
        "scaled", with_layer(SCALED, "attention", StaleSlot, only=1), "step_by_step",
        ("decoding step by step", "model.layers.1.self_attn", "which slots"),
        "model.layers.1.self_attn", "context",
    ),
    "chunk forgets what is cached": Fault(
        "experts",
        replace(EXPERTS, make_layer=lambda *a: layer_with("attention", ForgetsCache)(*a)
                or experts_layer()(*a)),
        "chunked_prefill", ("prefill in chunks", A0, "what the cache holds"), A0, "context",
    ),
    "requests of a batch mixed": Fault(
        "scaled", with_layer(SCALED, "attention", MixesRequests), "ragged_batch",
        ("a request in a ragged batch", "request", A0), A0, "q",
    ),
    "wrong window": Fault(
        "windowed", with_spec(WINDOWED, windows=(8, 8)), "matches_reference",
        (A0, "sliding window"), A0, "context",
    ),
    "no window": Fault(
        "windowed", with_spec(WINDOWED, windows=()), "matches_reference",
        (A0, "sliding window"), A0, "context",
    ),
    "hooks while decoding": Fault(
        "scaled", with_layer(SCALED, "mlp", AsksForParts), "no_hooks_while_decoding",
        ("hook calls", "0 hook calls"),
    ),
}  # fmt: skip
