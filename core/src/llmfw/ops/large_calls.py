"""Calls of the ops that wait for memory, each of which moves more than a device's caches hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from llmfw.ops.costs import Arguments
from llmfw.ops.costs_state import single_tokens


@dataclass(frozen=True)
class Call:
    """One call.

    Args:
        shape: The static shape.
        tokens: Tokens of the call; above 64 they are one prompt.
        kv_len: Tokens of each request in the cache.
        changed: What becomes of the arguments that the op's entry in `BENCHES` draws.
        note: What that is, for people.
        code: As in `OpContext`.
    """

    shape: Mapping[str, int]
    tokens: int
    kv_len: int = 1024
    changed: Callable[[Arguments], Arguments] | None = None
    note: str = ""
    code: str = ""


def _whole_distribution(arguments: Arguments) -> Arguments:
    """Draws by temperature alone, without a cut."""
    logits, best, columns, _ = arguments
    columns = columns.clone()
    columns[2] = 1.0
    return logits, best, columns, False


def _one_each(arguments: Arguments) -> Arguments:
    """As many requests of one token, each with its own state, in place of one prompt."""
    *given, state, _ = arguments
    count = given[0].shape[0]
    states = torch.randn(count, *state.shape[1:], device=state.device)
    return *given, states, single_tokens(count, 1024, state.device)


_HEADS = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "block_size": 16}
_ATTENTION = {"window": 0, "softcap": 0, "sinks": 0}
_ROWS = (Call({"hidden_size": 4096}, 16384),)
_GATED = (Call({"intermediate_size": 14336}, 4096),)
_VOCABULARY = {"vocab_size": 128_256}

LARGE_CALLS: Mapping[str, tuple[Call, ...]] = {
    "linear": tuple(
        Call({"in_features": 4096, "out_features": 28672, "bias": 0}, tokens) for tokens in (1, 32)
    ),
    "gated_linear": tuple(
        Call({"in_features": 4096, "intermediate_size": 14336, "bias": 0}, tokens)
        for tokens in (1, 32)
    ),
    "moe_experts": tuple(
        Call(
            {"num_experts": 128, "hidden_size": 2048, "intermediate_size": 768, "bias": 0},
            tokens,
            code="silu(gate) * up",
        )
        for tokens in (8, 64)
    ),
    "embedding": (Call({"num_embeddings": 128_256, "embedding_dim": 4096}, 16384),),
    "rms_norm": _ROWS,
    "add_rms_norm": _ROWS,
    "layer_norm": _ROWS,
    "gated_rms_norm": (Call({"hidden_size": 5120, "num_groups": 1}, 8192),),
    "silu_and_mul": _GATED,
    "gelu_and_mul": _GATED,
    "gelu_tanh_and_mul": _GATED,
    "rope_and_cache": (Call({**_HEADS, "rotary_dim": 128, "interleaved": 0, "qk_norm": 0}, 16384),),
    "paged_attention": (
        Call({**_HEADS, **_ATTENTION, "v_head_dim": 128, "latent": 0}, 32, 4096),
        Call(
            {
                **_ATTENTION,
                "num_heads": 16,
                "num_kv_heads": 1,
                "head_dim": 576,
                "v_head_dim": 512,
                "block_size": 16,
                "latent": 1,
            },
            64,
            4096,
        ),
    ),
    "causal_conv1d": (Call({"channels": 8192, "kernel_size": 4}, 8192),),
    "selective_scan": (
        Call({"channels": 8192, "state_size": 16}, 64),
        Call({"channels": 8192, "state_size": 16}, 256, changed=_one_each, note="one each"),
    ),
    "ssd_scan": (Call({"num_heads": 128, "head_dim": 64, "num_groups": 8, "state_size": 128}, 64),),
    "argmax": (Call(_VOCABULARY, 256), Call(_VOCABULARY, 1024)),
    "draw_tokens": (
        Call(_VOCABULARY, 256, changed=_whole_distribution, note="temperature"),
        Call(_VOCABULARY, 256, note="top_p"),
    ),
    "copy_blocks": (Call({}, 2048),),
}
