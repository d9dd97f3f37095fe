"""Models with recurrent state on a GPU: steps from CUDA graphs give the tokens of eager ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import FalconMambaConfig, Mamba2Config, MambaConfig

from llmfw import LLM, SamplingParams
from parity import NORMALISES_GROUPS, random_prompts, tiny_hf

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
VOCAB = 512
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "eos_token_id": None,
}
MODELS = {
    "MambaForCausalLM": MambaConfig(**BASE),
    "FalconMambaForCausalLM": FalconMambaConfig(**BASE),
    "Mamba2ForCausalLM": Mamba2Config(
        **BASE, num_heads=8, head_dim=64, n_groups=1 + NORMALISES_GROUPS, state_size=128
    ),
}
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
TIE = 1e-3  # of two logits in float32


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: Any, tmp_path_factory: Any) -> tuple[Path, torch.nn.Module]:
    torch.backends.cuda.matmul.allow_tf32 = False
    hf = tiny_hf(MODELS[request.param], request.param, "eager")
    folder = tmp_path_factory.mktemp(request.param)
    hf.save_pretrained(folder)
    return folder, hf.to("cuda")


def engine(folder: Path, **settings: Any) -> LLM:
    """An engine in float32; batches of 3, 5, 6 and 7 requests are padded."""
    settings = {"max_num_seqs": 9, "max_model_len": 300, "dtype": "float32", **settings}
    return LLM(folder, skip_tokenizer_init=True, device="cuda", **settings)


def tokens(llm: LLM, prompts: list[list[int]], params: Any = GREEDY) -> list[list[int]]:
    with llm:
        return [list(out.outputs[0].token_ids) for out in llm.generate(prompts, params)]


def assert_same(hf: Any, prompts: list[list[int]], one: Any, other: Any) -> None:
    """Equal, or both transformers' best up to a tie."""
    for prompt, *both in zip(prompts, one, other, strict=True):
        if both[0] == both[1]:
            continue
        for got in both:
            with torch.no_grad():
                logits = hf(torch.tensor([[*prompt, *got]], device="cuda")).logits[0].float()
            rows = logits[len(prompt) - 1 : -1]
            gaps = rows.max(-1).values - rows[range(len(got)), got]
            first = int((gaps > 0).nonzero()[0]) if bool((gaps > 0).any()) else None
            assert first is None or gaps[first] < TIE, f"token {first} is {gaps[first]:.4f} below"


@pytest.mark.parametrize(
    "settings",
    [
        {"cuda_graphs": False},
        {"max_num_batched_tokens": 64},
        {"overlap_scheduling": False},
        {"max_num_seqs": 1},
        {"kernels": "reference"},
    ],
    ids=str,
)
def test_each_switch_alone_changes_no_token(checkpoint: Any, settings: dict[str, Any]) -> None:
    folder, hf = checkpoint
    prompts = random_prompts(12, VOCAB, 1, 200)
    plain = engine(folder)
    assert plain._engine._executor.runner.graphs is not None
    assert_same(hf, prompts, tokens(plain, prompts), tokens(engine(folder, **settings), prompts))


def test_graphs_need_kernels_that_read_the_batch_on_the_device(checkpoint: Any) -> None:
    folder, _ = checkpoint
    with engine(folder, kernels="causal_conv1d=reference") as llm:
        assert llm._engine._executor.runner.graphs is None


def test_graphs_replay_the_same_bits(checkpoint: Any) -> None:
    """Slots are zeros again where a request begins, whoever had them before."""
    folder, _ = checkpoint
    prompts = random_prompts(7, VOCAB, 5, 50, seed=2)
    with engine(folder, dtype="bfloat16") as llm:
        runs = [
            [list(out.outputs[0].token_ids) for out in llm.generate(prompts, GREEDY)]
            for _ in range(3)
        ]
    assert runs[0] == runs[1] == runs[2]


def test_beams_copy_the_state_of_their_parents(checkpoint: Any) -> None:
    folder, _ = checkpoint
    beams = SamplingParams(num_beams=3, max_tokens=12, ignore_eos=True)
    prompts = random_prompts(4, VOCAB, 1, 60, seed=5)
    plain = tokens(engine(folder), prompts, beams)
    assert plain == tokens(engine(folder, cuda_graphs=False), prompts, beams)


@pytest.mark.parametrize("checkpoint", ["Mamba2ForCausalLM"], indirect=True)
def test_prompts_by_chunks_are_as_near_to_float32_as_the_scan(checkpoint: Any) -> None:
    folder, _ = checkpoint
    prompts = random_prompts(6, VOCAB, 9, 290, seed=7)
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=20, ignore_eos=True)

    def probabilities(dtype: str, kernel: str) -> list[dict[int, float]]:
        with engine(folder, dtype=dtype, kernels=f"ssd_scan={kernel}") as llm:
            outputs = [out.outputs[0].logprobs[0] for out in llm.generate(prompts, params)]
        return [{token: told.logprob for token, told in each.items()} for each in outputs]

    exact = probabilities("float32", "cupy.ssd_scan")

    def mean_error(kernel: str) -> float:
        found = probabilities("bfloat16", kernel)
        pairs = [(x[i], y[i]) for x, y in zip(found, exact, strict=True) for i in x.keys() & y]
        assert len(pairs) > 10 * len(prompts)
        return sum(abs(x - y) for x, y in pairs) / len(pairs)

    assert mean_error("cupy.ssd_chunks") < 1.5 * mean_error("cupy.ssd_scan")
