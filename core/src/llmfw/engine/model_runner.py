"""The worker: holds the model, its caches and the sequences' state, and runs the steps."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from llmfw.attention.backend import get_attention_backend
from llmfw.attention.metadata import AttentionMetadata, CacheSpec
from llmfw.attention.state import StateCache, StateSpec, slot_bytes
from llmfw.engine import kv_cache
from llmfw.engine.batch import Batch, BatchBuilder, upload
from llmfw.engine.cuda_graphs import no_graphs
from llmfw.engine.graph_runner import GraphRunner, Replayed
from llmfw.engine.request_table import RequestTable
from llmfw.engine.sampler import Places, sample
from llmfw.engine.sampling_plan import plan_sampling, rehearsal
from llmfw.engine.settings import EngineSettings
from llmfw.engine.step import Chunk, Fork, NewRequest, StepInput
from llmfw.engine.step_results import NOTHING, PendingStep, gather_extras, gather_prompt
from llmfw.engine.workspace import graph_bytes, peak_bytes, sampling_bytes
from llmfw.errors import ConfigError, DeviceError
from llmfw.ops import DeviceInfo, OpTable
from llmfw.ops.device import as_current
from llmfw.ops.memory import memory_for
from llmfw.phases import Phases
from llmfw.sampling_params import SamplingParams

logger = logging.getLogger("llmfw.engine")

_STEP_CURES = ("lower max_num_batched_tokens or max_num_seqs", "or load a smaller dtype")
_CACHE_CURES = ("lower kv_cache_memory, max_num_seqs or max_model_len",)
_GRAPH_CURES = ("lower max_num_seqs or kv_cache_memory", "or turn CUDA graphs off")


class Model(Protocol):
    """What the engine needs of a model."""

    @property
    def max_positions(self) -> int | None:
        """Most positions it can be given, or None for any."""

    def cache_specs(self) -> Mapping[int, CacheSpec]:
        """What each layer keeps for each token, by layer index."""

    def state_specs(self) -> Mapping[int, StateSpec]:
        """What each layer keeps for each request, by layer index."""

    def __call__(
        self, attn_metadata: AttentionMetadata, input_ids: torch.Tensor, position_ids: torch.Tensor
    ) -> torch.Tensor:
        """Logits [rows, vocab] of the tokens in attn_metadata.logits_indices, or of all."""


@dataclass(frozen=True)
class RunnerFacts:
    """What the scheduler must know of the worker.

    num_blocks: of the KV cache; 0 for a model that keeps none.
    kv_cache_bytes, state_bytes: of all blocks; of the recurrent state of all sequences.
    """

    max_model_len: int
    num_blocks: int
    block_size: int
    max_num_seqs: int
    shares_prefixes: bool
    kv_cache_bytes: int
    state_bytes: int


class ModelRunner:
    """Runs steps of a model on one device.

    Args:
        model: The model, loaded.
        settings: Settings settled for the device.
        device: Where it runs.
        attn_backend: Name of the attention backend, whose layout the caches have.
        max_model_len: Most tokens of a sequence as the model was built for; its positions when left
            out.
        phases: Takes the seconds of "kernels", "cache" and "graphs".

    Raises:
        DeviceError: If the device has too little memory for a step, the caches or the graphs.
    """

    def __init__(
        self,
        model: Model,
        settings: EngineSettings,
        device: torch.device,
        *,
        attn_backend: str = "auto",
        max_model_len: int | None = None,
        phases: Phases | None = None,
    ) -> None:
        self.model = model
        self._built_len = max_model_len
        self._backend = get_attention_backend(attn_backend)
        self.settings = settings
        self.device = device
        config = getattr(model, "model_config", None)
        self._ops = OpTable(DeviceInfo(device, frozenset())) if config is None else config.ops
        self.specs = dict(model.cache_specs())
        self.state_specs = dict(model.state_specs())
        kv_cache.check_specs(self.specs)
        wanted = self._wanted_len()
        phases = phases or Phases()
        reserved = 0
        if device.type != "cpu":
            with phases.measure("kernels"), memory_for("a step", device, *_STEP_CURES):
                reserved = self._reserve(wanted)
        num_seqs = kv_cache.count_sequences(
            self.state_specs, self.specs, settings, device, reserved
        )
        self.settings = settings = replace(settings, max_num_seqs=num_seqs)
        self.max_num_seqs = num_seqs
        num_blocks = kv_cache.count_blocks(
            self.specs, settings, wanted, device, self._state_bytes, reserved
        )
        self.max_model_len = self._fit(wanted, num_blocks)
        self.num_blocks = num_blocks
        with phases.measure("cache"), memory_for("the caches", device, *_CACHE_CURES):
            self._allocate(num_seqs)
        self.graphs: GraphRunner | None = None
        if device.type == "cuda" and settings.cuda_graphs and self._capturable():
            with phases.measure("graphs"), memory_for("the CUDA graphs", device, *_GRAPH_CURES):
                self.graphs = GraphRunner(
                    model,
                    model.model_config,  # type: ignore[attr-defined]  # as _capturable saw
                    self.table,
                    self.caches,
                    self._num_groups,
                    num_blocks,
                    self.state.layers,
                )

    def _allocate(self, num_seqs: int) -> None:
        """Rows and blocks for all sequences; one more of each is for padded batches."""
        size, device = self.settings.block_size, self.device
        self.state = StateCache(self.state_specs, num_seqs + 1, device)  # as rows of the table
        self.table = RequestTable(num_seqs, self.max_model_len, size, device)
        self.caches = kv_cache.allocate(
            self.specs, self.num_blocks + 1, size, device, self._backend
        )
        self.builder = BatchBuilder(
            self.table, self.caches, self._num_groups, device, self.state.layers
        )

    @property
    def _num_groups(self) -> int:
        return len(kv_cache.group_of_specs(self.specs))

    @property
    def _state_bytes(self) -> int:
        return (self.max_num_seqs + 1) * slot_bytes(self.state_specs)

    def facts(self) -> RunnerFacts:
        """What the scheduler must know."""
        return RunnerFacts(
            self.max_model_len,
            self.num_blocks,
            self.settings.block_size,
            self.max_num_seqs,
            shares_prefixes=bool(self.specs) and not self.state_specs,
            kv_cache_bytes=self.num_blocks
            * kv_cache.block_bytes(self.specs, self.settings.block_size),
            state_bytes=self._state_bytes,
        )

    def launch(self, step: StepInput) -> PendingStep:
        """Start a step; on a GPU this returns before it is done, and nothing here waits for it."""
        self.table.apply(step)
        with as_current(self.device), torch.inference_mode():
            self._begin_states(step)
            if step.forks:
                self._fork(step.forks)
            replayed = None if self.graphs is None else self.graphs.run(step)
            if replayed is not None:
                return self._finish(step, replayed)
            batch = self.builder.build(step)
            logits = self.model(batch.metadata, batch.input_ids, batch.position_ids)
            return self._sample(step.step_id, batch, logits)

    def reset(self) -> None:
        """Forget all sequences."""
        self.table.clear()

    def _begin_states(self, step: StepInput) -> None:
        """Zero the state of sequences that begin, or begin again after preemption."""
        if not self.state_specs:
            return
        rows = [self.table.row_of[chunk.seq_id] for chunk in step.chunks if chunk.start == 0]
        if rows:
            self.state.clear(upload([np.array(rows)], torch.int64, self.device)[0])

    def _fork(self, forks: tuple[Fork, ...]) -> None:
        """Copy the blocks and the recurrent state that beams do not share with their parents."""
        copies = [fork for fork in forks if fork.source != fork.target]
        if copies:
            columns = [[fork.source for fork in copies], [fork.target for fork in copies]]
            sources, targets = upload(list(np.array(columns)), torch.int64, self.device)
            tensors = [tensor for cache in self.caches.values() for tensor in cache.tensors]
            copy = self._ops.resolve("copy_blocks", tensors[0].dtype)
            copy(sources, targets, *tensors)
        if self.state_specs:
            row_of = self.table.row_of
            pairs = [[row_of[fork.parent], row_of[fork.seq_id]] for fork in forks]
            self.state.copy(*upload(list(np.array(pairs).T), torch.int64, self.device))

    def _finish(self, step: StepInput, replayed: Replayed) -> PendingStep:
        """Take a replayed step's greedy tokens, or sample from its logits where a row wants it."""
        rows, positions, tokens = replayed.rows, replayed.positions, replayed.tokens
        plan = plan_sampling(self.table, rows, positions)
        seq_ids = replayed.seq_ids
        extras = NOTHING
        if plan.features:
            logits = replayed.logits
            if plan.changes_tokens:
                places = rows * self.table.max_model_len + positions
                (targets,) = upload([places], torch.int64, self.device)
                best = None if plan.changes_logits else tokens
                into = Places(self.table.flat_tokens, targets)
                tokens = sample(logits, plan, self._ops, into, best)
            extras = gather_extras(self.table, seq_ids, rows, positions, plan, logits, tokens)
        return PendingStep(step.step_id, seq_ids, tokens, extras)

    def _capturable(self) -> bool:
        """Whether ops that need lengths run by kernels that read them from the device."""
        config = getattr(self.model, "model_config", None)
        if config is None or self._backend.reference_only:
            return False
        reason = no_graphs(self.state_specs.values(), config.ops.choices.values())
        if reason is not None:
            logger.info("no CUDA graphs: %s", reason)
        return reason is None

    def _sample(self, step_id: int, batch: Batch, logits: torch.Tensor) -> PendingStep:
        seq_ids, rows, positions = batch.sample_seq_ids, batch.sample_rows, batch.sample_positions
        plan = plan_sampling(self.table, rows, positions)
        count = len(seq_ids)
        prompt = gather_prompt(self.table, batch, logits[count:]) if batch.prompt_rows else ()
        if batch.prompt_rows:
            logits = logits[:count]
        into = Places(self.table.flat_tokens, batch.sample_targets)
        tokens = sample(logits, plan, self._ops, into)
        extras = gather_extras(self.table, seq_ids, rows, positions, plan, logits, tokens)
        return PendingStep(step_id, seq_ids, tokens, extras, prompt)

    def _wanted_len(self) -> int:
        if self._built_len is not None:
            return self._built_len
        asked, positions = self.settings.max_model_len, self.model.max_positions
        if positions is None:
            return asked or 2048
        if asked is not None and asked > positions:
            raise ConfigError(
                f"max_model_len={asked}, but the model has {positions} positions",
                hint=f"ask for at most {positions}",
            )
        return asked or positions

    def _fit(self, wanted: int, num_blocks: int) -> int:
        capacity = num_blocks * self.settings.block_size
        if not self.specs or wanted <= capacity:
            return wanted
        if self.settings.max_model_len is not None:
            raise DeviceError(
                f"max_model_len={wanted}, but the KV cache holds {capacity} tokens",
                hint="raise kv_cache_memory or lower max_model_len",
            )
        logger.warning(
            "max_model_len is %d instead of the model's %d: the KV cache holds no more",
            capacity,
            wanted,
        )
        return capacity

    def _reserve(self, max_model_len: int) -> int:
        """Run the largest step; the bytes to leave for it and for the graphs."""
        settings = self.settings
        assert settings.max_num_batched_tokens is not None
        assert settings.max_num_seqs is not None
        row = (getattr(self.model, "vocab_size", None) or 0) * torch.float32.itemsize
        step = self._warm_up(max_model_len)
        if self.device.type != "cuda":
            return step
        step = max(step, sampling_bytes(settings.max_num_seqs, row))
        if not settings.cuda_graphs or not self._capturable():
            return step
        tokens = settings.max_num_batched_tokens
        attends = bool(self.specs)
        return step + graph_bytes(step, tokens, settings.max_num_seqs, max_model_len, row, attends)

    def _warm_up(self, max_model_len: int) -> int:
        """Run the largest step, which compiles and tunes its kernels; the bytes it takes."""
        settings = self.settings
        assert settings.max_num_batched_tokens is not None
        assert settings.max_num_seqs is not None
        size = settings.block_size
        longest = min(max_model_len, settings.max_num_batched_tokens)
        count = max(1, min(settings.max_num_batched_tokens // longest, settings.max_num_seqs))
        per_request = -(-longest // size)
        table = RequestTable(count, longest + 1, size, self.device)
        caches = kv_cache.allocate(
            self.specs, count * per_request, size, self.device, self._backend
        )
        state = StateCache(self.state_specs, count, self.device)
        builder = BatchBuilder(table, caches, self._num_groups, self.device, state.layers)
        greedy = SamplingParams(temperature=0.0).resolved()
        blocks = [tuple(range(i * per_request, (i + 1) * per_request)) for i in range(count)]
        step = StepInput(
            0,
            tuple(Chunk(i, 0, longest, True, blocks[i], True) for i in range(count)),
            count if longest == 1 else 0,
            tuple(NewRequest(i, (0,) * longest, greedy) for i in range(count)),
        )
        table.apply(step)
        batch = builder.build(step)
        inputs = batch.metadata, batch.input_ids, batch.position_ids
        with torch.inference_mode():
            drawn = rehearsal(count, self.device)
            return peak_bytes(lambda: sample(self.model(*inputs), drawn, self._ops), self.device)
