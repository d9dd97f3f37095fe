"""Logits as arrays, and words that must not come out, against plain references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import NoBadWordsLogitsProcessor

from engine_models import VOCAB, HistoryModel, TinyAttentionModel, run
from llmfw.errors import RequestError, UsageError
from llmfw.models.recording import ModuleRecorder
from llmfw.sampling_params import SamplingParams

PROMPTS = [[5] * 9, [1, 2, 3], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51], [7]]
BOTH = SamplingParams(
    temperature=0, max_tokens=6, return_context_logits=True, return_generation_logits=True
)


def logits_of(model: HistoryModel, tokens: list[int]) -> np.ndarray:
    """The logits after each of the tokens, float32 [tokens, vocab]."""
    rows = [model.logits_of(tokens[:end], range(end)) for end in range(1, len(tokens) + 1)]
    return torch.tensor(rows).double().float().numpy()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_batched_tokens": 5},
        {"pipeline_depth": 1},
        {"kv_cache_memory": 11 * 4 * 16, "max_model_len": 20},  # some are preempted
    ],
    ids=["plain", "chunked", "overlapped", "small cache"],
)
def test_logits_of_prompt_and_output(engines, settings):
    model = HistoryModel()
    engine = engines(model, **settings)
    plain = BOTH.replace(return_context_logits=False, return_generation_logits=False)
    params = [BOTH, plain, BOTH.replace(n=2), BOTH.replace(prompt_logprobs=1)]
    run(engine, PROMPTS, plain)  # so that prefixes are cached
    outputs = run(engine, PROMPTS, params)
    assert outputs[1].context_logits is outputs[1].outputs[0].generation_logits is None
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        if output is outputs[1]:
            continue
        assert np.array_equal(output.context_logits, logits_of(model, prompt))
        assert output.num_cached_tokens == 0
        for completion in output.outputs:
            tokens = [*prompt, *completion.token_ids]
            expected = logits_of(model, tokens)[len(prompt) - 1 : -1]
            assert np.array_equal(completion.generation_logits, expected)
            assert completion.generation_logits.argmax(-1).tolist() == completion.token_ids
    assert len(outputs[3].prompt_logprobs) == len(PROMPTS[3])


def test_logits_are_those_before_edits_and_come_with_beams(engines):
    model = HistoryModel()
    engine = engines(model)
    biased = BOTH.replace(logit_bias={7: 1000.0})
    output = run(engine, [[1, 2, 3]], biased)[0]
    assert output.outputs[0].token_ids == [7] * 6
    tokens = [1, 2, 3, *[7] * 6]
    assert np.array_equal(output.outputs[0].generation_logits, logits_of(model, tokens)[2:-1])
    beams = SamplingParams(num_beams=3, n=3, max_tokens=4, return_context_logits=True)
    searched = run(engine, [[1, 2, 3]], beams)[0]
    assert np.array_equal(searched.context_logits, logits_of(model, [1, 2, 3]))


def test_a_stream_has_the_logits_so_far(engines):
    from llmfw.request import Request

    engine = engines()
    generation = engine.add_request(Request("a", (1, 2), BOTH), streaming=True)
    for output in generation:
        completion = output.outputs[0]
        assert len(completion.generation_logits) == len(completion.token_ids)


def test_words_of_several_tokens_never_come_out_whole(engines):
    """Greedy tokens with bad words are those that transformers' processor leaves."""
    model = TinyAttentionModel()
    engine = engines(model)
    free = run(engine, PROMPTS, BOTH.replace(max_tokens=12))
    words = [
        word
        for output in free
        for word in (output.outputs[0].token_ids[3:5], output.outputs[0].token_ids[6:9])
    ]
    words += [
        [prompt[-1], output.outputs[0].token_ids[0]]
        for prompt, output in zip(PROMPTS, free, strict=True)
    ]
    words += [[free[0].outputs[0].token_ids[2]], list(range(40, 60))]
    params = BOTH.replace(max_tokens=12, bad_words=words)
    processor = NoBadWordsLogitsProcessor([list(map(int, word)) for word in words])
    outputs = run(engine, PROMPTS, params)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        made = output.outputs[0].token_ids
        logits = torch.from_numpy(output.outputs[0].generation_logits)
        for step, token in enumerate(made):
            known = torch.tensor([[*prompt, *made[:step]]])
            assert int(processor(known, logits[step : step + 1]).argmax()) == token
        assert made != free[PROMPTS.index(prompt)].outputs[0].token_ids


def test_bad_words_are_checked(engines):
    engine = engines()
    with pytest.raises(RequestError, match=f"token id {VOCAB} in bad_words is out of range"):
        run(engine, [[1]], SamplingParams(bad_words=[[1, VOCAB]]))
    with pytest.raises(RequestError, match="need a tokenizer"):
        run(engine, [[1]], SamplingParams(bad_words=["word"]))
    for wrong in ([[]], [""], 5, [[1.5]], [None]):
        with pytest.raises(UsageError, match="bad_words"):
            SamplingParams(bad_words=wrong)


class Pair(torch.nn.Module):
    """A layer that gives (hidden, residual), and a container that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(2, 2, bias=False)
        self.idle = torch.nn.ModuleList([torch.nn.Linear(2, 2)])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inner(x), x


class Wrapper(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Pair()

    def forward(self, attn_metadata: object, input_ids: torch.Tensor, position_ids: torch.Tensor):
        hidden, residual = self.layer(input_ids[:, None].float().expand(-1, 2))
        return hidden + residual


def test_a_recorder_keeps_what_chosen_modules_give(tmp_path):
    model = Wrapper()
    ids = torch.tensor([3, 4])
    with torch.no_grad(), ModuleRecorder(model, ["layer", "layer.i*"]) as recorder:
        first = model(None, ids, torch.tensor([0, 1]))
        model(None, ids + 1, position_ids=torch.tensor([2, 3]))
    model(None, ids, ids)
    names = ["input_ids", "position_ids", "layer.inner", "layer"]
    assert list(recorder.arrays) == [f"{step:04d}/{name}" for step in (0, 1) for name in names]
    assert recorder.arrays["0001/position_ids"].tolist() == [2, 3]
    assert np.array_equal(recorder.arrays["0000/layer"], first.numpy())
    assert recorder.silent == ["layer.idle", "layer.idle.0"]
    recorder.save(tmp_path / "new" / "file.npz")
    assert set(np.load(tmp_path / "new" / "file.npz").files) == set(recorder.arrays)
    with pytest.raises(UsageError, match=r"no module is named 'x\.\*'"):
        ModuleRecorder(model, ["x.*"])


class OnePlaceModel(HistoryModel):
    """Its logits lie where those of the step before lay, as a replayed graph's do."""

    def __init__(self) -> None:
        super().__init__()
        self.place = torch.zeros(64, self.vocab_size)

    def forward(self, attn_metadata, input_ids, position_ids):
        logits = super().forward(attn_metadata, input_ids, position_ids)
        self.place[: len(logits)] = logits
        return self.place[: len(logits)]


def test_logits_outlast_the_next_step(engines):
    model = OnePlaceModel()
    params = SamplingParams(temperature=0, max_tokens=6, return_generation_logits=True)
    outputs = run(engines(model, pipeline_depth=1), PROMPTS, params)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        completion = output.outputs[0]
        expected = logits_of(model, [*prompt, *completion.token_ids])[len(prompt) - 1 : -1]
        assert np.array_equal(completion.generation_logits, expected)
