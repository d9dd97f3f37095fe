"""What latent attention costs on a CPU: absorbed by kernels and references, and expanded.

    python tests/latent_attention_costs.py [THREADS]

One layer of DeepSeek-V2-Lite's sizes in bfloat16, from projected queries and the cache to the
values of all heads. Expanded: keys and values of every token in the cache are made anew, then
torch's attention of each head with its own. Medians of interleaved runs, in milliseconds.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from llmfw import MLAParams, ModelConfig
from llmfw.layers.latent import LatentProjection
from llmfw.models import bind_tree
from llmfw.models.build import finish_loading
from llmfw.models.weights import materialize
from llmfw.ops.device import device_info
from llmfw.ops.inputs import paged_batch
from llmfw.ops.table import OpTable
from llmfw.plugins import collect_kernels, load_kernel_packs

HEADS, BLOCK, DTYPE, CPU = 16, 16, torch.bfloat16, torch.device("cpu")
SIZES = MLAParams(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
SCALE = SIZES.qk_head_dim**-0.5
BATCHES: dict[str, tuple[tuple[tuple[int, int], ...], int]] = {
    "1 token after 1024": (((1, 1024),), 0),
    "1 token after 4096": (((1, 4096),), 0),
    "16 tokens after 512 each": (((1, 512),) * 16, 0),
    "prompt of 512": (((512, 512),), 1),
    "prompt of 2048": (((2048, 2048),), 1),
    "256 tokens after 1792": (((256, 2048),), 1),
}
Run = Callable[[], torch.Tensor]


def op_table(select: str) -> OpTable:
    """The CPU pack's kernels, or references only."""
    info = device_info(CPU)
    packs, _ = load_kernel_packs(info.features)
    return OpTable(info, tuple(collect_kernels(packs, info, ())[0]), select)


def absorbed(
    select: str, weight: torch.Tensor, q: torch.Tensor, cache: torch.Tensor, batch: tuple
) -> Run:
    """As the layer `MLA` does it."""
    ops = op_table(select)
    config: ModelConfig = ModelConfig(pretrained_config=None, dtype=DTYPE, ops=ops)
    projection = LatentProjection(HEADS, SIZES, config.mapping)
    bind_tree(projection, config)
    materialize(projection, CPU)
    projection.weight.data.copy_(weight)
    finish_loading(projection)
    shape = {"num_heads": HEADS, "num_kv_heads": 1, "head_dim": 576, "v_head_dim": 512}
    shape |= {"window": 0, "softcap": 0, "sinks": 0, "block_size": BLOCK, "latent": 1}
    attend = ops.resolve("paged_attention", DTYPE, **shape)
    nope, rotated = q.split([SIZES.qk_nope_head_dim, SIZES.qk_rope_head_dim], dim=-1)

    def run() -> torch.Tensor:
        query = torch.cat((projection.absorb(nope), rotated), dim=-1)
        latents = attend(query, cache, cache[..., : SIZES.kv_lora_rank], *batch, SCALE)
        return projection.expand(latents.unflatten(-1, (HEADS, -1)))

    return run


def expanded(weight: torch.Tensor, q: torch.Tensor, cache: torch.Tensor, batch: tuple) -> Run:
    """Keys and values of all heads, for one request."""
    metadata, view = batch
    new, total = metadata.query_lens[0], metadata.kv_lens[0]
    mask = torch.ones(new, total, dtype=torch.bool).tril(total - new)

    def run() -> torch.Tensor:
        rows = cache[view.block_tables[0].long()].flatten(0, 2)[:total]
        latent, key = rows.split([SIZES.kv_lora_rank, SIZES.qk_rope_head_dim], dim=-1)
        both = F.linear(latent, weight).unflatten(-1, (HEADS, -1))
        k_nope, v = both.split([SIZES.qk_nope_head_dim, SIZES.v_head_dim], dim=-1)
        k = torch.cat((k_nope, key[:, None].expand(-1, HEADS, -1)), dim=-1)
        q_k_v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        whole = new == total
        attended = F.scaled_dot_product_attention(
            *q_k_v, attn_mask=None if whole else mask, is_causal=whole, scale=SCALE
        )
        return attended[0].transpose(0, 1).flatten(1)

    return run


def medians(runs: dict[str, Run], repeats: int) -> dict[str, float]:
    """Milliseconds of each, one after the other again and again."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for _ in range(repeats):
            for name, run in runs.items():
                begin = time.perf_counter()
                run()
                taken[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(values) for name, values in taken.items()}


def main() -> None:
    """Print a table."""
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else torch.get_num_threads())
    generator = torch.Generator().manual_seed(0)
    rows = HEADS * (SIZES.qk_nope_head_dim + SIZES.v_head_dim)
    weight = (torch.randn(rows, SIZES.kv_lora_rank, generator=generator) / 20).to(DTYPE)
    for label, (requests, contexts) in BATCHES.items():
        metadata, view, blocks = paged_batch(requests, contexts, BLOCK, generator, CPU)
        q = torch.randn(sum(metadata.query_lens), HEADS, SIZES.qk_head_dim).to(DTYPE)
        cache = torch.randn(blocks, BLOCK, 1, SIZES.latent_width, generator=generator).to(DTYPE)
        batch = (metadata, view)
        runs = {
            "kernels": absorbed("auto", weight, q, cache, batch),
            "references": absorbed("reference", weight, q, cache, batch),
        }
        if len(requests) == 1:
            runs["expanded"] = expanded(weight, q, cache, batch)
        wanted = runs["references"]().float()
        for name, run in runs.items():
            error = float((run().float() - wanted).norm() / wanted.norm())
            assert error < 2e-2, f"{name} is off by {error}"
        result = medians(runs, 5 if contexts else 15)
        print(label, *(f"{name} {ms:.2f}" for name, ms in result.items()), sep="\t")


if __name__ == "__main__":
    main()
