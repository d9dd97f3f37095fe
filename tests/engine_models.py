"""Small models that obey the engine's protocol, for tests of the engine without any family."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from llmfw.attention import AttentionMetadata, CacheSpec, StateSpec, StateTensor
from llmfw.engine.engine import LLMEngine
from llmfw.engine.executor import InProcessExecutor
from llmfw.engine.model_runner import ModelRunner
from llmfw.engine.settings import EngineSettings
from llmfw.ops.reference import paged_attention, rope_and_cache
from llmfw.request import Request, RequestOutput
from llmfw.sampling_params import SamplingParams

VOCAB = 97
CPU = torch.device("cpu")


class TestModel(nn.Module):
    """What all of them have: no recurrent state."""

    __test__ = False  # pytest

    def state_specs(self) -> dict[int, StateSpec]:
        return {}


class HistoryModel(TestModel):
    """The next token is a function of every token and position, read back from the cache.

    Stale or foreign cache entries, wrong slots, tables, lengths or positions all change the result,
    and nothing is rounded. `expected` gives the same without an engine.
    """

    max_positions: int | None = 256

    def __init__(self, vocab: int = VOCAB, *, groups: int = 1) -> None:
        super().__init__()
        self.vocab_size = vocab
        self.groups = groups
        self.steps: list[AttentionMetadata] = []
        self.before_step: Callable[[AttentionMetadata], None] = lambda metadata: None

    def cache_specs(self) -> dict[int, CacheSpec]:
        kinds = [
            CacheSpec(1, 1, torch.float64),
            CacheSpec(1, 1, torch.float64, kind="sliding", window=64),
        ]
        return {layer: kinds[layer % self.groups] for layer in range(self.groups)}

    def forward(
        self, attn_metadata: AttentionMetadata, input_ids: torch.Tensor, position_ids: torch.Tensor
    ) -> torch.Tensor:
        self.before_step(attn_metadata)
        self.steps.append(attn_metadata)
        assert torch.equal(position_ids, attn_metadata.positions)
        assert (
            attn_metadata.cu_query_lens.tolist()[-1]
            == len(input_ids)
            == sum(attn_metadata.query_lens)
        )
        assert attn_metadata.kv_lens_device.tolist() == list(attn_metadata.kv_lens)
        contexts = attn_metadata.query_lens[: attn_metadata.num_contexts]
        assert all(n > 1 for n in contexts)
        assert all(n == 1 for n in attn_metadata.query_lens[attn_metadata.num_contexts :])
        for cache in attn_metadata.caches.values():
            view = attn_metadata.groups[cache.group]
            cache.k.view(-1)[view.slots] = input_ids.double()
            cache.v.view(-1)[view.slots] = position_ids.double()
        rows = []
        for request, (query_len, kv_len) in enumerate(
            zip(attn_metadata.query_lens, attn_metadata.kv_lens, strict=True)
        ):
            for end in range(kv_len - query_len + 1, kv_len + 1):
                rows.append(self._read(attn_metadata, request, end))
        logits = torch.tensor(rows).double()
        if attn_metadata.logits_indices is not None:
            logits = logits[attn_metadata.logits_indices]
        return logits.float()

    def _read(self, metadata: AttentionMetadata, request: int, end: int) -> list[float]:
        seen = []
        for cache in metadata.caches.values():
            view = metadata.groups[cache.group]
            blocks = view.block_tables[request, : -(-end // view.block_size)].long()
            tokens = cache.k[blocks].view(-1)[:end].long().tolist()
            positions = cache.v[blocks].view(-1)[:end].long().tolist()
            seen.append((tokens, positions))
        assert all(pair == seen[0] for pair in seen)
        return self.logits_of(*seen[0])

    def logits_of(self, tokens: Sequence[int], positions: Sequence[int]) -> list[float]:
        state = 0
        for token, position in zip(tokens, positions, strict=True):
            state = self.next_state(state, token, position)
        return self.logits_after(state)

    def next_state(self, state: int, token: int, position: int) -> int:
        return ((state + 7) * 31 + token * 17 + position * 5 + 1) % 1_000_003

    def logits_after(self, state: int) -> list[float]:
        best = state % self.vocab_size
        return [-0.2 * ((token - best) % self.vocab_size) for token in range(self.vocab_size)]

    def expected(self, prompt: Sequence[int], count: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            logits = self.logits_of(tokens, range(len(tokens)))
            tokens.append(max(range(self.vocab_size), key=logits.__getitem__))
        return tokens[len(prompt) :]


class RecurrentModel(HistoryModel):
    """As `HistoryModel`, from a number that each request carries along; with groups from both."""

    def __init__(self, vocab: int = VOCAB, *, groups: int = 0, width: int = 1) -> None:
        super().__init__(vocab, groups=groups)
        self.width = width

    def cache_specs(self) -> dict[int, CacheSpec]:
        return super().cache_specs() if self.groups else {}

    def state_specs(self) -> dict[int, StateSpec]:
        tensors = {
            "odd": StateTensor((3,), torch.bfloat16),  # so that the next one needs alignment
            "history": StateTensor((self.width,), torch.int64),
        }
        return {7: StateSpec(tensors)}

    def forward(
        self, attn_metadata: AttentionMetadata, input_ids: torch.Tensor, position_ids: torch.Tensor
    ) -> torch.Tensor:
        logits = super().forward(attn_metadata, input_ids, position_ids) if self.groups else None
        if not self.groups:
            self.before_step(attn_metadata)
            self.steps.append(attn_metadata)
        state = attn_metadata.states[7]["history"]
        rows = []
        ends = attn_metadata.cu_query_lens.tolist()
        slots = attn_metadata.state_slots.tolist()
        assert len(set(slots)) == len(slots)
        for slot, start, end in zip(slots, ends, ends[1:], strict=False):
            history = int(state[slot, 0])
            assert position_ids[start] > 0 or history == 0
            for token, position in zip(
                input_ids[start:end].tolist(), position_ids[start:end].tolist(), strict=True
            ):
                history = self.next_state(history, token, position)
                rows.append(self.logits_after(history))
            state[slot] = history
        found = torch.tensor(rows)
        if attn_metadata.logits_indices is not None:
            found = found[attn_metadata.logits_indices]
        assert logits is None or torch.equal(found, logits)
        return found


class TinyAttentionModel(TestModel):
    """Two attention layers with rotary positions over the paged cache, random weights."""

    max_positions: int | None = 256
    heads, kv_heads, head_dim, hidden, layers = 4, 2, 8, 32, 2

    def __init__(self, vocab: int = VOCAB, *, seed: int = 0, device: torch.device = CPU) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        width = (self.heads + 2 * self.kv_heads) * self.head_dim

        def weight(*shape: int) -> torch.Tensor:
            return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(device)

        self.vocab_size = vocab
        self.embed = torch.randn(vocab, self.hidden, generator=generator).to(device)
        self.qkv = [weight(width, self.hidden) for _ in range(self.layers)]
        self.out = [weight(self.hidden, self.heads * self.head_dim) for _ in range(self.layers)]
        self.head = weight(vocab, self.hidden) * 3
        angles = torch.arange(256)[:, None] * 100.0 ** -(torch.arange(4) / 4)
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)

    def cache_specs(self) -> dict[int, CacheSpec]:
        return {
            i: CacheSpec(self.kv_heads, self.head_dim, torch.float32) for i in range(self.layers)
        }

    def forward(
        self, attn_metadata: AttentionMetadata, input_ids: torch.Tensor, position_ids: torch.Tensor
    ) -> torch.Tensor:
        x = self.embed[input_ids]
        for layer in range(self.layers):
            cache = attn_metadata.caches[layer]
            view = attn_metadata.groups[cache.group]
            q = rope_and_cache(
                x @ self.qkv[layer].T, position_ids, self.cos_sin, cache.k, cache.v, view.slots,
                self.heads, self.kv_heads, self.head_dim,
            )  # fmt: skip
            attended = paged_attention(
                q, cache.k, cache.v, attn_metadata, view, self.head_dim**-0.5
            )
            x = x + attended @ self.out[layer].T
        if attn_metadata.logits_indices is not None:
            x = x[attn_metadata.logits_indices]
        return x @ self.head.T


class StatelessModel(TestModel):
    """No cache at all: the next token follows from the last token and its position."""

    max_positions: int | None = None
    vocab_size = VOCAB

    def cache_specs(self) -> dict[int, CacheSpec]:
        return {}

    def forward(
        self, attn_metadata: AttentionMetadata, input_ids: torch.Tensor, position_ids: torch.Tensor
    ) -> torch.Tensor:
        logits = torch.zeros(len(input_ids), VOCAB)
        logits[torch.arange(len(input_ids)), (input_ids * 3 + position_ids) % VOCAB] = 1.0
        rows = attn_metadata.logits_indices
        return logits if rows is None else logits[rows]


def make_engine(
    model: nn.Module, *, tokenizer=None, eos_ids=frozenset(), device: torch.device = CPU, **settings
) -> LLMEngine:
    """An engine on a test model; block size 4 and 8 sequences unless told."""
    settings = {"block_size": 4, "max_num_seqs": 8, **settings}
    settled = EngineSettings(**settings).on(device.type)
    runner = ModelRunner(model, settled, device)
    return LLMEngine(
        InProcessExecutor(runner),
        settled,
        tokenizer=tokenizer,
        eos_ids=eos_ids,
        vocab_size=model.vocab_size,
    )


def run(
    engine: LLMEngine,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
) -> list[RequestOutput]:
    """Add all prompts at once and wait for all."""
    each = params if isinstance(params, (list, tuple)) else [params] * len(prompts)
    generations = [
        engine.add_request(Request(engine.new_request_id(), tuple(prompt), sampling))
        for prompt, sampling in zip(prompts, each, strict=True)
    ]
    return [generation.result(timeout=60) for generation in generations]


def tokens_of(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    """The first completion's tokens of each output."""
    return [output.outputs[0].token_ids for output in outputs]


def memory_for(model: nn.Module, blocks: int, block_size: int = 4) -> int:
    """kv_cache_memory that gives a test model so many blocks."""
    return blocks * block_size * sum(spec.bytes_per_token for spec in model.cache_specs().values())
