"""What a step costs beside the model; no test, `python tests/engine_overhead.py` prints a table."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from engine_models import CPU, run
from llmfw.attention import AttentionMetadata, CacheSpec, StateSpec
from llmfw.engine.engine import LLMEngine, scheduler_config
from llmfw.engine.executor import InProcessExecutor
from llmfw.engine.model_runner import ModelRunner
from llmfw.engine.scheduler import Scheduler
from llmfw.engine.sequence import Sequence
from llmfw.engine.settings import EngineSettings
from llmfw.engine.step import NewRequest
from llmfw.engine.tokenizer import Tokenizer
from llmfw.kernels.cpu.declare import kernels
from llmfw.ops import OpTable
from llmfw.ops.device import device_info
from llmfw.sampling_params import SamplingParams
from tiny_tokenizer import tiny_backend

VOCAB = 49_152
STEPS = 200
KINDS = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 0.8},
    "top_k, top_p": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "repetition": {"temperature": 0, "repetition_penalty": 1.1},
}


class NoModel(nn.Module):
    """Takes no time: logits made beforehand, peaked like a language model's."""

    max_positions = 8192
    vocab_size = VOCAB

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.logits = (torch.randn(rows, VOCAB) * 3).bfloat16()
        self.logits[:, 95:] -= 20  # the tiny tokenizer's tokens

    def cache_specs(self) -> dict[int, CacheSpec]:
        return {layer: CacheSpec(3, 64, torch.bfloat16) for layer in range(30)}

    def state_specs(self) -> dict[int, StateSpec]:
        return {}

    def forward(
        self, attn_metadata: AttentionMetadata, input_ids: torch.Tensor, position_ids: torch.Tensor
    ) -> torch.Tensor:
        wanted = attn_metadata.logits_indices
        return self.logits[: attn_metadata.num_requests if wanted is None else len(wanted)]


def parts(rows: int, params: SamplingParams) -> dict[str, float]:
    """Median microseconds of each part of a decode step."""
    settings = EngineSettings().on("cpu")
    runner = ModelRunner(NoModel(rows), settings, CPU)
    runner._ops = OpTable(device_info(CPU), tuple(kernels()))
    scheduler = Scheduler(scheduler_config(runner.facts(), settings))
    for seq_id in range(rows):
        new = NewRequest(seq_id, tuple(range(seq_id, seq_id + 90)), params.resolved())
        scheduler.add(Sequence(new, 8000))
    spent: dict[str, list[float]] = {"schedule": [], "pack": [], "sample": [], "receive": []}
    for _ in range(STEPS):
        marks = [time.perf_counter()]
        step = scheduler.schedule()
        marks.append(time.perf_counter())
        runner.table.apply(step)
        batch = runner.builder.build(step)
        marks.append(time.perf_counter())
        with torch.inference_mode():
            logits = runner.model(batch.metadata, batch.input_ids, batch.position_ids)
            output = runner._sample(step.step_id, batch, logits).read()
        marks.append(time.perf_counter())
        for seq_id, token in zip(output.seq_ids, output.token_ids, strict=True):
            scheduler.receive(seq_id, token)
        marks.append(time.perf_counter())
        for name, start, end in zip(spent, marks, marks[1:], strict=False):
            spent[name].append((end - start) * 1e6)
    return {name: statistics.median(times[20:]) for name, times in spent.items()}


def whole_loop(rows: int) -> float:
    """Microseconds of a greedy step through the engine's thread, text included; best of five."""
    settings = EngineSettings().on("cpu")
    engine = LLMEngine(
        InProcessExecutor(ModelRunner(NoModel(rows), settings, CPU)),
        settings,
        tokenizer=Tokenizer(tiny_backend()),
        vocab_size=VOCAB,
    )
    params = SamplingParams(temperature=0, max_tokens=STEPS)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        run(engine, [range(row, row + 90) for row in range(rows)], params)
        best = min(best, (time.perf_counter() - start) / STEPS)
    engine.shutdown()
    return best * 1e6


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    for rows in (1, 16, 64):
        for kind, fields in KINDS.items():
            costs = parts(rows, SamplingParams(**fields))
            line = "  ".join(f"{name} {cost:6.0f}" for name, cost in costs.items())
            print(f"batch {rows:3}  {kind:13} {line}  sum {sum(costs.values()):6.0f} us")
        print(f"batch {rows:3}  greedy, whole loop: {whole_loop(rows):.0f} us a step")


if __name__ == "__main__":
    main()
