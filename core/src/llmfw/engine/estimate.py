"""What a model takes and runs by on a GPU that need not be there: from its configuration alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llmfw.attention.state import slot_bytes
from llmfw.engine import kv_cache
from llmfw.engine.context_step import LENGTHS
from llmfw.engine.cuda_graphs import batch_sizes, kv_limits, no_graphs
from llmfw.engine.gpus import GPU
from llmfw.engine.settings import EngineSettings, parse_memory
from llmfw.layers import Embedding, Linear, LMHead, MoE
from llmfw.models.build import build
from llmfw.models.manifest import GraphPlan
from llmfw.models.prepare import PreparedModel, op_table, prepare_model
from llmfw.models.pretrained import PretrainedModel
from llmfw.ops.device import cuda_features
from llmfw.ops.kernel import DeviceInfo, Kernel, OpContext
from llmfw.ops.table import Choice, OpTable, reference_of

CONTEXT_BYTES = 600 << 20  # CUDA's own, with cuBLAS' workspaces; an estimate


@dataclass(frozen=True)
class KernelChoice:
    """What an op of one shape would run by.

    Args:
        op: The op.
        shape: Its static shape, as text.
        kernel: A kernel's name, or "reference".
        reasons: Why others do not serve.
    """

    op: str
    shape: str
    kernel: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Estimate:
    """A model on a GPU, in bytes unless told otherwise.

    Args:
        gpu: The GPU.
        dtype: What the model runs in.
        weights: Of all parameters; exact.
        activations: Of the largest step; estimated.
        kv_bytes_per_token: Of K and V of all layers; exact.
        kv_cache: What is left for the cache, or what was asked for; at most what all sequences
            need.
        kv_tokens: Tokens that it holds.
        state: Of recurrent state of all sequences.
        max_model_len: Most tokens of a sequence.
        max_num_seqs: Most sequences in flight.
        full_sequences: How many sequences of the full length the cache holds at once.
        tokens_per_second: Of one sequence at most: its weights are read once a token.
        graphs: What would be captured; nothing where `no_graphs` says why.
        kernels: What each op would run by.
        no_graphs: Why nothing would be captured, or None.
    """

    gpu: GPU
    dtype: str
    weights: int
    activations: int
    kv_bytes_per_token: int
    kv_cache: int
    kv_tokens: int
    state: int
    max_model_len: int
    max_num_seqs: int
    full_sequences: float
    tokens_per_second: float
    graphs: GraphPlan
    kernels: tuple[KernelChoice, ...]
    no_graphs: str | None

    @property
    def fits(self) -> bool:
        """Whether one sequence of the full length can run."""
        return self.full_sequences >= 1


def graph_plan(max_num_seqs: int, max_model_len: int, attends: bool = True) -> GraphPlan:
    """The graphs that a worker with these limits captures."""
    lengths = tuple(length for length in LENGTHS if length < max_model_len)
    limits = tuple(kv_limits(max_model_len, attends))
    return GraphPlan(tuple(batch_sizes(max_num_seqs)), limits, lengths)


def estimate(
    model: str | Path,
    gpu: GPU,
    *,
    settings: EngineSettings | None = None,
    dtype: str = "auto",
    kernels: str = "auto",
    **more: Any,
) -> Estimate:
    """What a model would take and run by; reads no weights, and asks for no GPU.

    Args:
        model: Anything that `LLM` takes.
        gpu: The GPU.
        settings: Lengths and numbers; the cache's memory as bytes, or a fraction of what is free.
        dtype: What it runs in; "auto" is the checkpoint's.
        kernels: Which kernels may be chosen, as for `LLM`.
        **more: `plugin`, `plugin_modules` and `extensions`, as `prepare_model` takes them.

    Raises:
        LlmfwError: As `prepare_model`.
    """
    settled = (settings or EngineSettings()).on("cuda")
    prepared = prepare_model(
        model, dtype=dtype, device="cpu", max_model_len=settled.max_model_len, **more
    )
    table = _table_for(prepared, gpu, kernels)
    config = replace(prepared.model_config, device=table.info.device, ops=table)
    built = build(config, prepared.host)
    length, seqs = config.max_model_len, settled.max_num_seqs
    assert length is not None
    assert seqs is not None
    weights = sum(each.numel() * each.element_size() for each in built.parameters())
    per_token = sum(spec.bytes_per_token for spec in built.cache_specs().values())
    state = (seqs + 1) * slot_bytes(built.state_specs())
    activations = _activations(built, settled, length)
    free = gpu.memory - CONTEXT_BYTES - weights - activations
    tokens = _cache_tokens(settled, free - state, per_token, length)
    reason = no_graphs(built.state_specs().values(), table.choices.values())
    graphs = graph_plan(seqs, length, bool(per_token)) if reason is None else GraphPlan((), (), ())
    return Estimate(
        gpu=gpu,
        dtype=str(config.dtype).removeprefix("torch."),
        weights=weights,
        activations=activations,
        kv_bytes_per_token=per_token,
        kv_cache=tokens * per_token,
        kv_tokens=tokens,
        state=state,
        max_model_len=length,
        max_num_seqs=seqs,
        full_sequences=round(tokens / length, 2) if per_token else float(seqs),
        tokens_per_second=round(gpu.bandwidth / _read_a_token(built), 1),
        graphs=graphs,
        kernels=tuple(_shown(choice) for choice in table.choices.values()),
        no_graphs=reason,
    )


class _PlannedOps(OpTable):
    """Chooses kernels without building one: what it resolves is the reference."""

    def _choose(
        self, context: OpContext, parts: Mapping[str, str]
    ) -> tuple[Callable[..., Any], Choice]:
        refused: list[tuple[str, str]] = []
        chosen = "reference"
        for kernel in self.ranked(context.op):
            reason = self._asked(kernel, context) or self._bypassed(kernel, parts)
            if reason is None:
                chosen = kernel.name
                break
            refused.append((kernel.name, reason))
        reference = reference_of(context.op, self.kernels)
        return reference, Choice(context, chosen, tuple(refused))

    def _asked(self, kernel: Kernel, context: OpContext) -> str | None:
        try:
            return self.refusal(kernel, context)
        except Exception as exc:  # a pack's own predicate may want the device
            return f"cannot be asked here: {type(exc).__name__}: {exc}"


def _table_for(prepared: PreparedModel, gpu: GPU, select: str) -> OpTable:
    """The packs' kernels for such a GPU, with CuPy."""
    features = {"cuda", "cupy", *cuda_features(*gpu.capability)}
    info = DeviceInfo(torch.device("cuda", 0), frozenset(features))
    table = op_table(prepared.host, info, select)
    return _PlannedOps(info, table.kernels, select)


def _cache_tokens(settings: EngineSettings, free: int, per_token: int, length: int) -> int:
    """Whole blocks that fit, at most what all sequences at full length need."""
    if per_token == 0:
        return 0
    memory = parse_memory(settings.kv_cache_memory)
    fraction = memory if isinstance(memory, float) else kv_cache.DEFAULT_FRACTION
    budget = memory if isinstance(memory, int) else int(max(free, 0) * fraction)
    size = settings.block_size
    assert settings.max_num_seqs is not None
    needed = settings.max_num_seqs * -(-length // size)
    return min(needed, max(budget, 0) // (per_token * size)) * size


def _activations(model: PretrainedModel[Any], settings: EngineSettings, length: int) -> int:
    """Of the largest step: the residual stream and its copies, the widest layer, and logits."""
    linears = [each for each in model.modules() if isinstance(each, Linear)]
    inner = [each for each in linears if not isinstance(each, LMHead)]
    hidden = max((each.in_features for each in linears if isinstance(each, LMHead)), default=0)
    widest = max((each.local_out for each in inner), default=0)
    vocab = max((each.local_out for each in linears if isinstance(each, LMHead)), default=0)
    assert settings.max_num_batched_tokens is not None
    assert settings.max_num_seqs is not None
    itemsize = model.model_config.dtype.itemsize
    tokens = settings.max_num_batched_tokens
    rows = settings.max_num_seqs
    return tokens * (4 * hidden + 2 * widest) * itemsize + rows * vocab * (itemsize + 4)


def _read_a_token(model: PretrainedModel[Any]) -> int:
    """Bytes of weights that one token goes through: no table of embeddings, some of the experts."""
    heads = {id(each.weight) for each in model.modules() if isinstance(each, LMHead)}
    total = sum(each.nbytes for each in model.parameters())
    for each in model.modules():
        if isinstance(each, Embedding) and id(each.weight) not in heads:
            total -= each.weight.nbytes
        elif isinstance(each, MoE):
            experts = sum(weight.nbytes for weight in each.experts.parameters())
            total -= experts - experts * each.moe.top_k // each.moe.num_experts
    return total


def _shown(choice: Choice) -> KernelChoice:
    """A choice as it is told."""
    context = choice.context
    shape = " ".join(f"{name}={value}" for name, value in context.shape.items())
    reasons = tuple(f"{name}: {reason}" for name, reason in choice.refused)
    return KernelChoice(context.op, shape, choice.chosen, reasons)
