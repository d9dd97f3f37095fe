"""The op `expanded_attention`: latent attention of prompts by torch's flash attention.

The latents of the context requests' keys are gathered, one product makes keys and values of all
heads, and flash attention does the rest. A value is padded to a key's width, which it asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from llmfw.kernels.cupy.attention import Once, context_batch
from llmfw.kernels.cupy.compile import load
from llmfw.kernels.cupy.launch import Launcher, dense
from llmfw.kernels.cupy.paged_decode import check_block_size
from llmfw.kernels.cupy.prefill import KEYS, THREADS, ContextBatch, flash_attention
from llmfw.ops.kernel import OpContext

if TYPE_CHECKING:
    from llmfw.attention.metadata import AttentionMetadata, CacheGroupView

WIDEST = 256  # of a head, for flash attention
EXPAND_THREADS = 128
LEAST_GAIN = 4e9  # operations saved; below them the absorbed kernel's single launch is quicker
MOST_BYTES = 512 << 20  # of what is made for one layer: more than a step is sure to find free


@dataclass(frozen=True)
class ExpandedHeads:
    """The static shape of one kind of latent attention layer, as prompts see it."""

    num_heads: int
    latent_dim: int
    rotary_dim: int
    key_dim: int
    v_dim: int
    block_size: int

    @classmethod
    def of(cls, context: OpContext) -> ExpandedHeads:
        """From the op's context."""
        return cls(
            context["num_heads"],
            context["latent_dim"],
            context["rotary_dim"],
            context["key_dim"],
            context["v_head_dim"],
            context["block_size"],
        )

    @property
    def width(self) -> int:
        """Features of a query and key head."""
        return self.key_dim + self.rotary_dim

    def gain(self, metadata: AttentionMetadata) -> float:
        """Operations that the absorbed way does more for the context requests."""
        first = metadata.num_contexts
        kv_lens = metadata.kv_lens[:first]
        lengths = zip(metadata.query_lens[:first], kv_lens, strict=True)
        pairs = sum(new * (total - new / 2) for new, total in lengths)
        absorbed = 2.0 * pairs * (2 * self.latent_dim + self.rotary_dim)
        attended = 2.0 * pairs * 2 * self.width
        made = 2.0 * sum(kv_lens) * self.latent_dim * (self.key_dim + self.v_dim)
        return self.num_heads * (absorbed - attended - made)

    def nbytes(self, metadata: AttentionMetadata, itemsize: int) -> int:
        """Memory for the context requests: rows, their product, keys and values."""
        keys = sum(metadata.kv_lens[: metadata.num_contexts])
        each = self.num_heads * (self.key_dim + self.v_dim + 2 * self.width)
        return keys * (each + self.latent_dim + self.rotary_dim) * itemsize


def supports(context: OpContext) -> str | None:
    """Heads that flash attention takes, rows of whole 16 bytes."""
    heads = ExpandedHeads.of(context)
    sizes = (heads.latent_dim, heads.rotary_dim, heads.key_dim, heads.v_dim)
    if any(size % 8 for size in sizes):
        return f"sizes {', '.join(map(str, sizes))} are not multiples of 8"
    if heads.v_dim > heads.width or heads.width > WIDEST:
        return f"heads of {heads.width} and {heads.v_dim} features are not up to {WIDEST}"
    return None


class ExpandedAttention:
    """The compiled kernels for one head layout."""

    def __init__(self, context: OpContext) -> None:
        self.heads = ExpandedHeads.of(context)
        self._context = context
        self._launchers: tuple[Launcher, Launcher] | None = None

    def __call__(
        self,
        q: torch.Tensor,
        cache: torch.Tensor,
        weight: torch.Tensor,
        block_tables: torch.Tensor,
        batch: ContextBatch,
        scale: float,
    ) -> torch.Tensor:
        """q [tokens, heads, width] of the context requests -> [tokens, heads * v_dim]."""
        heads = self.heads
        rows = self.gather(cache, block_tables, batch)
        made = F.linear(rows[:, : heads.latent_dim], weight)
        k, v = self.expand(rows, made)
        attended = flash_attention(q, k, v, batch, scale, None)
        return attended[..., : heads.v_dim].flatten(1)

    def gather(
        self, cache: torch.Tensor, block_tables: torch.Tensor, batch: ContextBatch
    ) -> torch.Tensor:
        """The cached rows of the requests' keys, [keys, latent_dim + rotary_dim]."""
        heads = self.heads
        rows = cache.new_empty(batch.keys, heads.latent_dim + heads.rotary_dim)
        gather, _ = self._launch()
        gather(
            (-(-batch.max_kv // KEYS), batch.requests, 1),
            (THREADS, 1, 1),
            rows.data_ptr(),
            0,
            cache.data_ptr(),
            0,
            block_tables.data_ptr(),
            batch.cu_k.data_ptr(),
            block_tables.stride(0),
            cache.stride(0),
            cache.stride(1),
            0,
            0,
        )
        return rows

    def expand(self, rows: torch.Tensor, made: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [keys, heads, width] of rows and made [keys, heads * (key + v)]."""
        heads = self.heads
        k, v = (rows.new_empty(len(rows), heads.num_heads, heads.width) for _ in range(2))
        _, expand = self._launch()
        expand(
            (len(rows), 1, 1),
            (EXPAND_THREADS, 1, 1),
            k.data_ptr(),
            v.data_ptr(),
            made.data_ptr(),
            rows.data_ptr(),
        )
        return k, v

    def _launch(self) -> tuple[Launcher, Launcher]:
        """The kernels that gather and expand, compiled when first wanted."""
        if self._launchers is None:
            heads, context = self.heads, self._context
            gather = load(
                "gather_cache.cu",
                context.info.device,
                context.dtype,
                BLOCK_SIZE=heads.block_size,
                K_PACKS=(heads.latent_dim + heads.rotary_dim) // 8,
                V_PACKS=0,
                KEYS=KEYS,
                THREADS=THREADS,
            )
            expand = load(
                "expand_latents.cu",
                context.info.device,
                context.dtype,
                HEADS=heads.num_heads,
                LATENT_DIM=heads.latent_dim,
                ROTARY_DIM=heads.rotary_dim,
                KEY_DIM=heads.key_dim,
                V_DIM=heads.v_dim,
                THREADS=EXPAND_THREADS,
            )
            self._launchers = (
                gather.launcher("gather_cache", "PPPPPPqqqqq"),
                expand.launcher("expand_latents", "PPPP"),
            )
        return self._launchers


def expanded_attention(context: OpContext) -> Callable[..., torch.Tensor]:
    """The op `expanded_attention` for one head layout."""
    attend = ExpandedAttention(context)
    heads, batches = attend.heads, Once(context_batch)
    itemsize = context.dtype.itemsize

    def is_worth(metadata: AttentionMetadata) -> bool:
        fits = heads.nbytes(metadata, itemsize) <= MOST_BYTES
        return fits and heads.gain(metadata) >= LEAST_GAIN

    worth = Once(is_worth)

    def call(
        q: torch.Tensor,
        cache: torch.Tensor,
        weight: torch.Tensor,
        metadata: AttentionMetadata,
        view: CacheGroupView,
        scale: float,
    ) -> torch.Tensor:
        check_block_size(heads.block_size, view.block_size)
        batch = batches.of(metadata)
        return attend(dense(q), cache, weight, view.block_tables, batch, scale)

    def pays(metadata: AttentionMetadata) -> bool:
        """Whether the batch's context requests are worth the launches, and find room."""
        return metadata.num_contexts > 0 and worth.of(metadata)

    call.pays = pays  # type: ignore[attr-defined]
    return call
