"""What the sampler has to do for the rows of one batch, gathered from the request table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from llmfw.engine.batch import upload
from llmfw.engine.request_table import NUMBERS, Feature, RequestTable, RowExtras


@dataclass(frozen=True, slots=True)
class Penalties:
    """The rows that have penalties: the arguments of the op `penalise` after the logits.

    rows: int64 [p], of the batch. sequences: int64 [p], their rows in tokens.
    tokens: int32 [all sequences, max_model_len]. lens, prompt_lens: int64 [p].
    strengths: float32 [3, p], repetition, presence, frequency. longest: of the lens (host).
    """

    rows: torch.Tensor
    sequences: torch.Tensor
    tokens: torch.Tensor
    lens: torch.Tensor
    prompt_lens: torch.Tensor
    strengths: torch.Tensor
    longest: int


@dataclass(frozen=True, slots=True)
class BadWords:
    """Token sequences that must not be completed.

    rows, last: int64 [w], the row and the token that would complete the word.
    prefix: int64 [w, longest - 1], the tokens before it, -1 before a shorter one's start.
    history: int64 [w, longest - 1], the row's latest tokens, -2 before its start.
    """

    rows: torch.Tensor
    last: torch.Tensor
    prefix: torch.Tensor
    history: torch.Tensor


@dataclass(frozen=True, slots=True)
class Edits:
    """Values added to single logits: rows, ids int64 [e], values float32 [e]."""

    rows: torch.Tensor
    ids: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """Parameters of a batch's rows; a part that no row needs is None.

    parameters: float64 [5, rows], those of the op `draw_tokens`.
    cuts: whether top_k or top_p is set in some row (host).
    logprobs: for each row how many best ones are wanted, -1 for none at all, or None when no row
        wants any.
    """

    features: Feature
    parameters: torch.Tensor | None = None
    cuts: bool = False
    edits: Edits | None = None
    penalties: Penalties | None = None
    bad_words: BadWords | None = None
    logprobs: tuple[int | None, ...] | None = None

    @property
    def changes_logits(self) -> bool:
        """Whether tokens are chosen from other logits than the model's."""
        parts = (self.edits, self.penalties, self.bad_words)
        return any(part is not None for part in parts)

    @property
    def changes_tokens(self) -> bool:
        """Whether other tokens than the best may be chosen."""
        return self.changes_logits or self.parameters is not None


GREEDY = SamplingPlan(Feature(0))


_MOST = 2**31 - 1  # of top_k, which is then no limit


def rehearsal(rows: int, device: torch.device) -> SamplingPlan:
    """A plan that runs the kernels of every draw, to compile them, and takes the best tokens."""
    parameters = torch.zeros(5, rows, dtype=torch.float64, device=device)
    return SamplingPlan(Feature.RANDOM, parameters, cuts=True)


def uniform(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One number in [0, 1) for each (seed, position), the same in any batch.

    Two rounds of the finaliser of SplitMix64 (Steele, Lea, Flood 2014); 52 bits of it.
    """
    with np.errstate(over="ignore"):
        state = _mix(seeds + _GOLDEN)
        state = _mix(state ^ (positions.astype(np.uint64) * _GOLDEN))
    draws: np.ndarray = (state >> np.uint64(12)).astype(np.float64) * 2.0**-52
    return draws


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def plan_sampling(table: RequestTable, rows: np.ndarray, positions: np.ndarray) -> SamplingPlan:
    """The plan for `rows` of the table, whose next tokens will stand at `positions`."""
    features = Feature(int(np.bitwise_or.reduce(table.features[rows]))) if len(rows) else Feature(0)
    if not features:
        return GREEDY
    device = table.tokens.device
    extras = [table.extras[row] for row in rows]
    parts: dict[str, object] = {}
    if features & Feature.RANDOM:
        parts |= _random_parts(table, rows, positions, features)
    if features & Feature.EDITS:
        parts["edits"] = _edits(table, rows, positions, extras, device)
    if features & Feature.PENALTIES:
        parts["penalties"] = _penalties(table, rows, positions)
    if features & Feature.BAD_WORDS:
        parts["bad_words"] = _bad_words(table, rows, positions, extras)
    if features & Feature.LOGPROBS:
        parts["logprobs"] = tuple(
            extra.new.sampling.logprobs if extra else None for extra in extras
        )
    return SamplingPlan(features, **parts)  # type: ignore[arg-type]


def _random_parts(
    table: RequestTable, rows: np.ndarray, positions: np.ndarray, features: Feature
) -> dict[str, object]:
    numbers = table.numbers[rows].astype(np.float64)  # [rows, len(NUMBERS)]
    temperature, top_p, min_p = (
        numbers[:, NUMBERS.index(name)] for name in ("temperature", "top_p", "min_p")
    )
    random = temperature > 0
    with np.errstate(divide="ignore"):
        scale = np.minimum(np.log2(np.e) / temperature, np.finfo(np.float32).max)
        farthest = -np.log2(min_p)
    columns = (
        np.where(random, scale, 0).astype(np.float32),
        np.where(random, table.top_k[rows].clip(0, _MOST), 0),
        np.where(random, top_p, 1),
        np.where(random, farthest, np.inf).astype(np.float32),
        uniform(table.seeds[rows], positions),
    )
    (flat,) = upload([np.concatenate(columns)], torch.float64, table.tokens.device)
    return {
        "parameters": flat.view(5, -1),
        "cuts": bool(features & (Feature.TOP_K | Feature.TOP_P)),
    }


def _edits(
    table: RequestTable,
    rows: np.ndarray,
    positions: np.ndarray,
    extras: Sequence[RowExtras | None],
    device: torch.device,
) -> Edits | None:
    ids: list[np.ndarray] = []
    values: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    for index, (row, position, extra) in enumerate(zip(rows, positions, extras, strict=True)):
        if extra is None:
            continue
        made = position - table.prompt_lens[row]
        early = extra.stop_ids if made < extra.new.sampling.min_tokens else extra.stop_ids[:0]
        ids += [extra.edit_ids, early]
        values += [extra.edit_values, np.full(len(early), -np.inf, dtype=np.float32)]
        owners.append(np.full(len(extra.edit_ids) + len(early), index))
    joined = np.concatenate(ids)
    if not len(joined):
        return None
    rows_, ids_ = upload([np.concatenate(owners), joined], torch.int64, device)
    (values_,) = upload([np.concatenate(values)], torch.float32, device)
    return Edits(rows_, ids_, values_)


def _penalties(table: RequestTable, rows: np.ndarray, positions: np.ndarray) -> Penalties:
    device = table.tokens.device
    which = np.flatnonzero(table.features[rows] & Feature.PENALTIES)
    chosen, lens = rows[which], positions[which]
    integers = upload([which, chosen, lens, table.prompt_lens[chosen]], torch.int64, device)
    names = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    strengths = np.concatenate([table.numbers[chosen, NUMBERS.index(name)] for name in names])
    (strengths_,) = upload([strengths], torch.float32, device)
    which_, rows_, lens_, prompt_lens = integers
    return Penalties(
        which_,
        rows_,
        table.tokens,
        lens_,
        prompt_lens,
        strengths_.view(3, -1),
        int(lens.max()),
    )


def _bad_words(
    table: RequestTable, rows: np.ndarray, positions: np.ndarray, extras: Sequence[RowExtras | None]
) -> BadWords:
    words = [
        (index, word) for index, extra in enumerate(extras) if extra for word in extra.bad_words
    ]
    width = max(len(word) for _, word in words) - 1
    prefix = np.full((len(words), width), -1)
    for line, (_, word) in enumerate(words):
        prefix[line, width - len(word) + 1 :] = word[:-1]
    owners = np.array([index for index, _ in words])
    places = positions[owners, None] - width + np.arange(width)  # [words, width]
    flat = rows[owners, None] * table.max_model_len + np.maximum(places, 0)
    owners_, last, prefix_, flat_, outside = upload(
        [
            owners,
            np.array([word[-1] for _, word in words]),
            prefix.reshape(-1),
            flat.reshape(-1),
            (places < 0).reshape(-1).astype(np.int64),
        ],
        torch.int64,
        table.tokens.device,
    )
    history = table.flat_tokens.index_select(0, flat_).long().masked_fill(outside.bool(), -2)
    return BadWords(owners_, last, prefix_.view(prefix.shape), history.view(prefix.shape))
