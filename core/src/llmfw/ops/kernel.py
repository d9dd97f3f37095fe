"""What a kernel declares about itself; a kernel pack returns a list of these."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

DTYPE_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class DeviceInfo:
    """Where kernels run: the torch device, and what it can do as feature strings.

    Features: "cpu" or "cuda"; "sm_80", "sm_89", "sm_90" (every level up to the device's own);
    "avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8"; "cupy" where CuPy
    imports, "compiler" where a C++ compiler is found.
    """

    device: torch.device
    features: frozenset[str]


@dataclass(frozen=True)
class OpContext:
    """The static facts of one use of an op: a module's shapes, known while the model is built.

    shape: per op:
        linear: in_features, out_features, bias (0 or 1: whether calls may give one)
        float32_linear: the same; the dtype is that of x
        grouped_linear: num_groups, in_features, out_features
        head_linear: num_heads, in_features, out_features
        moe_route: num_experts, top_k, num_groups (1: none)
        moe_experts: num_experts, hidden_size, intermediate_size, bias (0 or 1); `code` is that of
            the gated activation
        gated_linear: in_features, intermediate_size, bias (0 or 1)
        add_linear: in_features, out_features
        normed_linear: in_features, out_features, bias (0 or 1)
        normed_gated_linear: in_features, intermediate_size, bias (0 or 1)
        rms_norm, add_rms_norm, layer_norm: hidden_size
        gated_rms_norm: hidden_size, num_groups
        silu_and_mul, gelu_and_mul, gelu_tanh_and_mul: intermediate_size
        rope_and_cache: num_heads, num_kv_heads, head_dim, rotary_dim, interleaved, qk_norm (0 or
            1), block_size
        latent_rope_and_cache: num_heads, latent_dim, rotary_dim, interleaved, norm (0 or 1),
            block_size
        paged_attention: num_heads, num_kv_heads, head_dim, v_head_dim, window (0: none), softcap
            (0 or 1), sinks (0 or 1), block_size; latent (0 or 1): v_cache is a strided view, the
            first v_head_dim features of k_cache
        expanded_attention: num_heads, latent_dim, rotary_dim, key_dim (of a head, without
            rotary_dim), v_head_dim, block_size
        causal_conv1d: channels, kernel_size
        selective_scan: channels, state_size
        ssd_scan: num_heads, head_dim, num_groups, state_size
        embedding: num_embeddings, embedding_dim
        prepare_decode, copy_blocks, penalise: nothing
        argmax, draw_tokens: vocab_size
    code: for ops that say so, a C expression that a kernel may compile in; "" where there is none.
    """

    op: str
    dtype: torch.dtype
    info: DeviceInfo
    shape: Mapping[str, int] = field(default_factory=dict)
    code: str = ""

    def __getitem__(self, name: str) -> int:
        """The static shape fact `name`."""
        return self.shape[name]


@dataclass(frozen=True)
class Kernel:
    """One implementation of an op.

    Args:
        op: Name of the op; its reference gives the meaning and the signature.
        name: Unique name such as "cupy.rms_norm".
        factory: "module:function", imported only when the kernel is chosen. `function(context)`
            gives the callable, with the reference's signature. A callable may have `details`, a
            text for people: what it settled for where it had a choice. One for `linear` or
            `head_linear` may have `prepare(weight) -> Tensor`, called once after loading, whose
            result is passed as `weight` from then on. One for `expanded_attention` must have
            `pays(metadata) -> bool`: whether it is quicker for a batch than `paged_attention`. One
            for `add_linear`, `normed_linear` or `normed_gated_linear` may have
            `serves_rows(rows) -> bool`: whether it is quicker for so many than the norm and the
            product apart; without it it is asked to do all up to 256.
        requires: Device features that must all be there, e.g. ("cuda", "sm_80", "cupy").
        dtypes: Names of the dtypes served.
        supports: Given the context, None when the kernel serves it, else the reason why not.
        priority: The highest wins; the reference stands at 0, so a negative one serves only when
            asked for by name.
        tolerance: Greatest allowed ||out - ref|| / ||ref|| by dtype name.
        reference: For an op that core does not know: "module:function" of its torch reference.
        inputs: For such an op: "module:function" that draws inputs for a check, given (context,
            generator).
        cost: For such an op: "module:function" that gives `llmfw.ops.costs.Cost` of a call, given
            (context, arguments, results); all tensors count as moved once when left out.
        available: Given the device, None when it and what is installed have all that the kernel
            needs, else the reason why not, where `requires` cannot say it; asked before `supports`,
            and for lists of kernels.
        builds_on: Name of another kernel of the op, by which this one serves the batches that it is
            not made for: what may stand in for that one may stand in for this one.
    """

    op: str
    name: str
    factory: str
    requires: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    supports: Callable[[OpContext], str | None] | None = None
    priority: int = 10
    tolerance: Mapping[str, float] = field(
        default_factory=lambda: {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
    )
    reference: str | None = None
    inputs: str | None = None
    cost: str | None = None
    pack: str = ""
    available: Callable[[DeviceInfo], str | None] | None = None
    builds_on: str = ""

    def missing(self, info: DeviceInfo) -> str | None:
        """What a device or an installation lacks for this kernel, or None when it is at hand."""
        lacks = [need for need in self.requires if need not in info.features]
        if lacks:
            return f"needs {', '.join(lacks)}"
        return self.available(info) if self.available else None

    def other_dtype(self, dtype: torch.dtype | None) -> str | None:
        """Which dtypes it serves where `dtype` is none of them, else None."""
        if dtype is None or dtype in {DTYPE_NAMES[name] for name in self.dtypes}:
            return None
        return f"serves {', '.join(self.dtypes)}, not {str(dtype).removeprefix('torch.')}"

    def refusal(self, context: OpContext) -> str | None:
        """Why this kernel cannot serve `context`, or None when it can."""
        lacks = self.missing(context.info) or self.other_dtype(context.dtype)
        if lacks is not None:
            return lacks
        return self.supports(context) if self.supports else None

    def build(self, context: OpContext) -> Callable[..., Any]:
        """The plain callable for `context`; imports the factory's module."""
        return load_object(self.factory)(context)  # type: ignore[no-any-return]

    def from_pack(self, pack: str) -> Kernel:
        """The same kernel, marked as coming from `pack`."""
        return replace(self, pack=pack)


def load_object(reference: str) -> Any:
    """The object named by "module:attribute"."""
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)
