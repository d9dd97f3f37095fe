"""The torch references of the ops around a model: what a decode step starts and ends with."""

from __future__ import annotations

import torch


def argmax(
    logits: torch.Tensor, tokens: torch.Tensor | None = None, places: torch.Tensor | None = None
) -> torch.Tensor:
    """The first greatest value of each row of logits [rows, vocab] -> int64 [rows].

    -1 where the greatest is not finite, or a value is NaN. With tokens (int32, flat) and places
    (int64 [rows]), max(result, 0) is stored in tokens[places].
    """
    best, found = _greatest(logits)
    found = found.masked_fill(~best.isfinite(), -1)
    if tokens is not None and places is not None:
        tokens.index_copy_(0, places, found.clamp_min(0).int())
    return found


def _greatest(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The maximum of each row and its first position; NaN counts as the greatest.

    On a CPU through numpy, which finds the position 10 times as fast there as torch.
    """
    if x.device.type != "cpu":
        best = x.max(dim=-1)
        return best.values, best.indices
    wide = x.float()
    index = torch.from_numpy(wide.numpy().argmax(axis=-1))
    return wide.gather(1, index[:, None])[:, 0], index


def copy_blocks(
    sources: torch.Tensor, targets: torch.Tensor, *caches: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Copy blocks within each cache [blocks, ...] in place; returns the caches.

    sources, targets: int64 [n], the blocks; no target is named twice, or is a source.
    """
    for cache in caches:
        cache.index_copy_(0, targets, cache.index_select(0, sources))
    return caches


def prepare_decode(
    rows: torch.Tensor,
    last: torch.Tensor,
    advance: torch.Tensor,
    tokens: torch.Tensor,
    blocks: torch.Tensor,
    max_model_len: int,
    block_size: int,
) -> tuple[torch.Tensor, ...]:
    """What a step of generation requests needs, from each one's row and last position.

    Args:
        rows: int64 [n], the requests' rows in tables of all requests.
        last: int64 [n], where each request's last token stands; goes on by `advance`, in place.
        advance: int64 [n].
        tokens: int32 [all rows * max_model_len], token values.
        blocks: int32 [all rows, max_blocks], cache blocks.
        max_model_len: Tokens of a row.
        block_size: Tokens of a cache block.

    Returns:
        input_ids int64 [n]; positions int64 [n], `last` as it was; targets int64 [n], where in
        tokens the next ones go; slots int64 [n]; kv_lens int32 [n]; block_tables int32
        [n, max_blocks].
    """
    positions = last.clone()
    last += advance
    places = rows * max_model_len + positions  # [n], where the last tokens stand
    tables = blocks.index_select(0, rows)  # [n, max_blocks]
    block = tables.gather(1, (positions // block_size)[:, None])[:, 0]
    slots = block.long() * block_size + positions % block_size
    input_ids = tokens.index_select(0, places).long()
    return input_ids, positions, places + 1, slots, (positions + 1).int(), tables
