"""The FlashInfer pack on a GPU that has FlashInfer: against the references, by name."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu.kernel_cases import (
    FEATURES,
    Batch,
    Case,
    attention_arguments,
    attention_cases,
    poisoned,
    relative_error,
)
from llmfw import LLM, SamplingParams
from llmfw.kernels.flashinfer import attention
from llmfw.kernels.flashinfer.declarations import FlashInferPack
from llmfw.ops.kernel import DeviceInfo, Kernel
from llmfw.ops.reference import REFERENCES

DEVICE = torch.device("cuda", 0)
INFO = DeviceInfo(DEVICE, FEATURES)
ON = {kernel.builds_on: kernel for kernel in FlashInferPack().llmfw_kernels(INFO)}
MISSING = ON["cupy.paged_attention"].missing(INFO) if torch.cuda.is_available() else None
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
]


@pytest.fixture(autouse=True)
def all_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """However short they are."""
    monkeypatch.setattr(attention, "LEAST_WORK", 0.0)
    monkeypatch.setattr(attention, "fills_tiles", lambda heads, batch: True)


def kernel_on(case: Case) -> Kernel:
    """The kernel that builds on the case's."""
    return ON[str(case.facts.get("kernel", "cupy.paged_attention"))]


def served() -> Iterator[Case]:
    """The CuPy pack's cases whose shapes this pack serves; of each batch with context requests."""
    for case in attention_cases():
        reason = replace(kernel_on(case), available=None).refusal(case.context(DEVICE))
        if reason is None and any(name in case.label for name in ("mixed", "prompts")):
            yield case


def built(case: Case) -> Callable[..., Any]:
    """The callable; where FlashInfer may not compile, cases whose kernels it lacks are skipped."""
    try:
        return kernel_on(case).build(case.context(DEVICE))
    except Exception as exc:
        if os.environ.get("FLASHINFER_DISABLE_JIT"):
            pytest.skip(f"no compiled kernel: {exc}")
        raise


@pytest.mark.parametrize("case", list(served()), ids=str)
def test_it_gives_what_the_reference_gives(case: Case) -> None:
    call = built(case)
    args, kwargs = case.draw(DEVICE, case.context(DEVICE).dtype, torch.Generator().manual_seed(0))
    expected = REFERENCES["paged_attention"](*args, **kwargs)
    with poisoned():
        out = call(*args, **kwargs)
    assert relative_error(out, expected) <= kernel_on(case).tolerance[case.dtype]


def big_case() -> Case:
    return next(c for c in served() if str(c) == "paged_attention-bfloat16-prompts-8/2x128b16")


@pytest.mark.parametrize("sinks", [0, 1])
def test_big_batches_of_prompts_chunks_and_generations(sinks: int) -> None:
    case = big_case()
    call = built(case)
    batch = Batch(((700, 700), (300, 1500), (1, 33), (512, 513), (1, 1200), (1, 1)), contexts=4)
    shape = {**case.shape, "sinks": sinks}
    args, kwargs = attention_arguments(
        DEVICE, torch.bfloat16, torch.Generator().manual_seed(7), shape, batch
    )
    expected = REFERENCES["paged_attention"](*args, **kwargs)
    assert relative_error(call(*args, **kwargs), expected) <= 8e-3


def test_plans_that_follow_each_other_quickly_do_not_mix() -> None:
    """Ten steps are prepared while the device is busy: each has the plan of its own batch."""
    case = big_case()
    call = built(case)
    batches = [Batch(((700 + 64 * i, 900 + 64 * i), (1, 300 + i)), contexts=1) for i in range(10)]
    drawn = [
        attention_arguments(
            DEVICE, torch.bfloat16, torch.Generator().manual_seed(i), case.shape, batch
        )
        for i, batch in enumerate(batches)
    ]
    outs = []
    torch.cuda._sleep(50_000_000)
    for args, kwargs in drawn:
        outs.append(call(*args, **kwargs))
    for out, (args, kwargs) in zip(outs, drawn, strict=True):
        expected = REFERENCES["paged_attention"](*args, **kwargs)
        assert relative_error(out, expected) <= 8e-3


def test_nothing_of_it_waits_for_the_device() -> None:
    case = big_case()
    call = built(case)
    batch = Batch(((700, 900), (64, 2000), (1, 300)), contexts=2)
    args, kwargs = attention_arguments(
        DEVICE, torch.bfloat16, torch.Generator().manual_seed(1), case.shape, batch
    )
    call(*args, **kwargs)
    torch.cuda.synchronize()
    with warnings.catch_warnings():  # torch calls the mode a prototype
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        call(*args[:3], replace(args[3]), *args[4:], **kwargs)  # another step: planned anew
    finally:
        torch.cuda.set_sync_debug_mode("default")


SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "intermediate_size": 1024,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
    "dtype": "bfloat16",
}


def test_a_model_answers_by_it(tmp_path: Path) -> None:
    """Chunked prompts beside requests that generate; decode steps stay the other pack's."""
    built(big_case())
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    prompts = [[(3 * i + n) % 1000 for i in range(n)] for n in (700, 40, 300, 5)]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, prompt_logprobs=0)
    found = []
    for kernels, serves in (("-flashinfer", "cupy"), ("flashinfer", "flashinfer")):
        with LLM(
            tmp_path,
            device="cuda",
            load_format="dummy",
            skip_tokenizer_init=True,
            kernels=kernels,
            max_num_seqs=8,
            max_model_len=1024,
            max_num_batched_tokens=256,
        ) as llm:
            outputs = llm.generate(prompts, params)
            choices = llm.loaded.model_config.ops.choices.values()
            chosen = {choice.context.op: choice.chosen for choice in choices}
        assert chosen["paged_attention"].startswith(f"{serves}.paged_")
        found.append(
            [
                entry[token].logprob
                for prompt, output in zip(prompts, outputs, strict=True)
                for token, entry in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
            ]
        )
    ours, theirs = (torch.tensor(each) for each in found)
    assert float((ours - theirs).abs().max()) < 0.05
    assert float(ours.std()) > 0.05
