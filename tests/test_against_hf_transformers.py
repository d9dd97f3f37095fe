"""The fallback against transformers itself, on architectures without a plugin of ours.

Tiny random models in float32: logits of whole prompts, chunks, single steps and ragged batches
within 1e-4, and greedy tokens through the engine, in a batch of requests.
"""

from __future__ import annotations

from typing import Any

import pytest

from llmfw.testing.checks import CHECKS
from llmfw.testing.subject import Subject

SWITCHES: dict[str, dict[str, Any]] = {
    "Cohere2ForCausalLM": {},  # one norm for both branches, windows in layers, tied
    "StableLmForCausalLM": {"use_qkv_bias": True, "use_parallel_residual": True},
}
MORE: dict[str, dict[str, Any]] = {
    "Olmo2ForCausalLM": {},  # it and the next are in the contract test, too
    "GraniteMoeForCausalLM": {},  # experts, converted by transformers' rules
    "GraniteForCausalLM": {"attention_multiplier": 0.2, "residual_multiplier": 0.4},
    "CohereForCausalLM": {"use_qk_norm": True},
    "Starcoder2ForCausalLM": {"sliding_window": 8},
    "SmolLM3ForCausalLM": {"no_rope_layers": [1, 0]},
    "GlmForCausalLM": {"partial_rotary_factor": 0.5},
    "Glm4ForCausalLM": {},
    "Exaone4ForCausalLM": {},
    "HeliumForCausalLM": {},
    "Ernie4_5ForCausalLM": {},
    "NemotronForCausalLM": {},  # LayerNorm1P, relu2
    "PersimmonForCausalLM": {"qk_layernorm": True},
    "ApertusForCausalLM": {},  # xIELU, whose parameters are the layer's own
    "GraniteSWAForCausalLM": {},  # windows and sinks
    "VaultGemmaForCausalLM": {},  # soft caps
    "OlmoeForCausalLM": {},
    "Ernie4_5_MoeForCausalLM": {"moe_layer_start_index": 1},  # a gate in float32
    "Glm4MoeForCausalLM": {},  # a correction that is a buffer in float32
    "MiniMaxM2ForCausalLM": {},
}
MLA = {  # values narrower than keys
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "num_key_value_heads": 4,
}
WANTED = (
    "accounts_for_every_tensor",
    "matches_reference",
    "step_by_step",
    "chunked_prefill",
    "ragged_batch",
    "greedy_matches_reference",
)


def assert_same(architecture: str, changes: dict[str, Any]) -> None:
    from llmfw.testing.tiny import shrunk_config

    tiny = {**shrunk_config(architecture), **changes}
    with Subject(architecture, tiny, distribution="llmfw-transformers") as subject:
        for check in (each for each in CHECKS if each.name in WANTED):
            check.run(subject)


@pytest.mark.parametrize("architecture", SWITCHES)
def test_against_hf_fallback(architecture: str):
    assert_same(architecture, SWITCHES[architecture])


@pytest.mark.parametrize(
    "architecture",
    [
        "CohereForCausalLM",  # tied
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("Olmo2ForCausalLM", *SWITCHES)),
        pytest.param("GraniteMoeForCausalLM", marks=pytest.mark.slow),
    ],
)
def test_against_hf_fallback_with_transformers_layers(
    architecture: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LLMFW_REPLACE_LAYERS", "off")
    assert_same(architecture, {**SWITCHES, **MORE}[architecture])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", MORE)
def test_against_hf_fallback_more(architecture: str):
    assert_same(architecture, MORE[architecture])


ROPE: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.1 * n for n in range(8)],
        "long_factor": [2.0 + 0.3 * n for n in range(8)],
        "original_max_position_embeddings": 128,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "linear": {"rope_type": "linear", "factor": 2.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ROPE)
def test_against_hf_fallback_rope(kind: str):
    assert_same("Olmo2ForCausalLM", {"rope_parameters": {"rope_theta": 1e4, **ROPE[kind]}})


@pytest.mark.slow
def test_against_hf_fallback_values_narrower_than_keys():
    assert_same("MiniCPM3ForCausalLM", MLA)
