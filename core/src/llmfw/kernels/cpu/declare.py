"""What the pack offers: its kernels as declarations."""

from __future__ import annotations

from llmfw.kernels.cpu import library
from llmfw.ops.kernel import Kernel, OpContext

MAX_HEAD_DIM = 1024  # rope.h keeps one head on the stack

MAX_TAPS, MAX_STATE = 8, 256  # recurrent.h keeps windows and rows of the state on the stack

_LAUNCH = "llmfw.kernels.cpu.launch"
_FILES = dict.fromkeys(("causal_conv1d", "selective_scan", "ssd_scan"), "_recurrent")
_FILES["draw_tokens"] = "_draw"


def kernels() -> list[Kernel]:
    """One declaration an op, in float32, bfloat16 and float16 each."""
    return [
        Kernel(
            op=op,
            name=f"cpu.{op}",
            factory=f"{_LAUNCH}{_FILES.get(op, '')}:{op}",
            requires=("cpu", "avx2"),
            supports=supports,
            priority=10,
        )
        for op, supports in {
            "linear": _if_built,
            "grouped_linear": _if_built,
            "head_linear": _if_built,
            "rms_norm": _if_built,
            "add_rms_norm": _if_built,
            "silu_and_mul": _if_built,
            "gelu_and_mul": _if_built,
            "gelu_tanh_and_mul": _if_built,
            "rope_and_cache": _heads,
            "latent_rope_and_cache": _rotated_heads,
            "paged_attention": _attention,
            "causal_conv1d": _taps,
            "selective_scan": _state,
            "ssd_scan": _state,
            "draw_tokens": _if_built,
        }.items()
    ]


def _if_built(context: OpContext) -> str | None:
    """Compiles the object when the first kernel is asked for."""
    return library.problem()


def _heads(context: OpContext) -> str | None:
    if context["head_dim"] > MAX_HEAD_DIM:
        return f"serves heads of up to {MAX_HEAD_DIM}, not {context['head_dim']}"
    return library.problem()


def _rotated_heads(context: OpContext) -> str | None:
    if context["rotary_dim"] > MAX_HEAD_DIM:
        return f"rotates up to {MAX_HEAD_DIM} features of a head, not {context['rotary_dim']}"
    return library.problem()


def _taps(context: OpContext) -> str | None:
    if context["kernel_size"] > MAX_TAPS:
        return f"serves up to {MAX_TAPS} tokens a sum, not {context['kernel_size']}"
    return library.problem()


def _state(context: OpContext) -> str | None:
    if context["state_size"] > MAX_STATE:
        return f"serves states of up to {MAX_STATE} numbers a row, not {context['state_size']}"
    return library.problem()


def _attention(context: OpContext) -> str | None:
    if context["num_heads"] % context["num_kv_heads"]:
        return f"{context['num_heads']} query heads are no multiple of {context['num_kv_heads']}"
    return library.problem()
