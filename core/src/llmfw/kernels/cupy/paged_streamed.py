"""The op `paged_attention` with tiles of keys by tensor copies: paged_streamed.cu."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmfw.kernels.cupy import paged_decode
from llmfw.kernels.cupy.attention import mixed_attention
from llmfw.kernels.cupy.paged_plan import Heads, copies_refusal
from llmfw.kernels.cupy.prefill import Prefill
from llmfw.ops.kernel import OpContext


def supports(context: OpContext) -> str | None:
    """What paged_decode.cu or paged_staged.cu serves, in tiles that tensor copies can bring."""
    return paged_decode.supports(context) or copies_refusal(Heads.of(context))


def paged_streamed(context: OpContext) -> Callable[..., torch.Tensor]:
    """The op `paged_attention` for one head layout."""
    return mixed_attention(context, Prefill(context), copied=True)
