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
    """History and strengths of the rows that have penalties.

    rows: int64 [p]. history: int64 [p, longest]. lens, prompt_lens: int64 [p, 1].
    repetition, presence, frequency: float32 [p, 1].
    counted: whether presence or frequency is set in any row (host).
    """

    rows: torch.Tensor
    history: torch.Tensor
    lens: torch.Tensor
    prompt_lens: torch.Tensor
    repetition: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor
    counted: bool


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

    random: bool [rows, 1], False for greedy rows. uniform: float64 [rows, 1] in [0, 1).
    temperature, top_p, min_p: float32 [rows, 1]. top_k: int64 [rows, 1], 0 for none.
    max_top_k, top_k_everywhere: the largest, and whether all random rows have one (host).
    logprobs: for each row how many best ones are wanted, -1 for none at all, or None when no row
        wants any.
    """

    features: Feature
    random: torch.Tensor | None = None
    uniform: torch.Tensor | None = None
    temperature: torch.Tensor | None = None
    top_k: torch.Tensor | None = None
    max_top_k: int = 0
    top_k_everywhere: bool = False
    top_p: torch.Tensor | None = None
    min_p: torch.Tensor | None = None
    edits: Edits | None = None
    penalties: Penalties | None = None
    bad_words: BadWords | None = None
    logprobs: tuple[int | None, ...] | None = None

    @property
    def filters(self) -> bool:
        """Whether top_k, top_p or min_p drop tokens of some row."""
        return not (self.top_k is self.top_p is self.min_p is None)


GREEDY = SamplingPlan(Feature(0))


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
    device = table.tokens.device
    numbers = table.numbers[rows]  # [rows, len(NUMBERS)]
    temperature, top_p, min_p = (
        numbers[:, NUMBERS.index(name)] for name in ("temperature", "top_p", "min_p")
    )
    random = temperature > 0
    top_k = np.where(random, np.maximum(table.top_k[rows], 0), 0)
    of_random = [
        np.where(random, column, neutral)
        for column, neutral in ((temperature, 1), (top_p, 1), (min_p, 0))
    ]
    floats = upload(of_random, torch.float32, device)
    (draws,) = upload([uniform(table.seeds[rows], positions)], torch.float64, device)
    top_k_, random_ = upload([top_k, random.astype(np.int64)], torch.int64, device)
    return {
        "random": random_.bool()[:, None],
        "uniform": draws[:, None],
        "temperature": floats[0][:, None],
        "top_k": top_k_[:, None] if features & Feature.TOP_K else None,
        "max_top_k": int(top_k.max()),
        "top_k_everywhere": bool((top_k[random] > 0).all()),
        "top_p": floats[1][:, None] if features & Feature.TOP_P else None,
        "min_p": floats[2][:, None] if features & Feature.MIN_P else None,
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
    which_, rows_, lens_, prompt_lens = upload(
        [which, chosen, lens, table.prompt_lens[chosen]], torch.int64, device
    )
    names = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    strengths = [table.numbers[chosen, NUMBERS.index(name)] for name in names]
    repetition, presence, frequency = upload(strengths, torch.float32, device)
    history = table.tokens[:, : int(lens.max())].index_select(0, rows_).long()
    return Penalties(
        which_,
        history,
        lens_[:, None],
        prompt_lens[:, None],
        repetition[:, None],
        presence[:, None],
        frequency[:, None],
        counted=bool(np.any(strengths[1]) or np.any(strengths[2])),
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
