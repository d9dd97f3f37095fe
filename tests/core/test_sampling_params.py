from __future__ import annotations

import dataclasses
import math
import pickle
import subprocess
import sys

import pytest

from llmfw.errors import UsageError
from llmfw.sampling_params import SamplingParams

FINE = {
    "n": [1, 8],
    "temperature": [0, 0.0, 1e-6, 2.5, None],
    "top_k": [-1, 0, 1, 10**6, None],
    "top_p": [1e-6, 1, 1.0, None],
    "min_p": [0, 0.5, 1],
    "repetition_penalty": [0.01, 1, 5.0],
    "presence_penalty": [-2, 0, 2],
    "frequency_penalty": [-2.0, 2],
    "seed": [None, 0, -1, (1 << 64) - 1],
    "max_tokens": [1, 10**9, None],
    "stop": ["x", ["x", "yz"], None],
    "stop_token_ids": [[1, 2], (), None],
    "logprobs": [None, 0, 5, -1],
    "prompt_logprobs": [None, 0, -1],
    "logit_bias": [None, {}, {3: 1.5}],
    "bad_words": [["bad word"], None],
}
WRONG = {
    "n": [0, -1, 1.5, True, "2", None],
    "temperature": [-0.1, math.nan, math.inf, -math.inf, "1", True],
    "top_k": [-2, 1.5, math.nan],
    "top_p": [0, 0.0, 1.01, -1, math.nan],
    "min_p": [-0.1, 1.1, math.nan],
    "repetition_penalty": [0, -1, math.nan, math.inf],
    "presence_penalty": [-2.1, 2.1, math.nan, None],
    "frequency_penalty": [3, math.nan],
    "seed": [1.5, 1 << 64, "0"],
    "max_tokens": [0, -5, 2.0, math.nan],
    "min_tokens": [-1, None],
    "stop": ["", ["a", ""], [1], 5, b"x"],
    "stop_token_ids": [[-1], ["a"], 5, [1.0]],
    "ignore_eos": [1, None],
    "detokenize": ["yes"],
    "logprobs": [-2, 1.5],
    "prompt_logprobs": [-2],
    "prompt_logprobs_start": [-1, 1.5],
    "logit_bias": [{"a": 1.0}, {-1: 1.0}, {1: math.nan}, {1: math.inf}, [1]],
    "bad_words": ["", [""]],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in FINE.items() for v in vs])
def test_values_in_range(name, value):
    SamplingParams(**{name: value})


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in WRONG.items() for v in vs])
def test_values_out_of_range_name_the_field(name, value):
    with pytest.raises(UsageError, match=name) as caught:
        SamplingParams(**{name: value})
    assert name in caught.value.hint


def test_unknown_name_tells_the_nearest():
    with pytest.raises(UsageError, match="'temprature'") as caught:
        SamplingParams(temprature=0.5)
    assert caught.value.hint == "did you mean 'temperature'?"
    assert isinstance(caught.value, ValueError)


def test_positional_arguments_are_refused():
    with pytest.raises(UsageError, match="keyword arguments only"):
        SamplingParams(2)


def test_contradictions():
    with pytest.raises(UsageError, match="min_tokens"):
        SamplingParams(min_tokens=10, max_tokens=9)
    with pytest.raises(UsageError, match="detokenize"):
        SamplingParams(stop="x", detokenize=False)


def test_frozen_and_picklable():
    params = SamplingParams(temperature=0.5, stop="x", logit_bias={1: 2})
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 1.0  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(params)) == params
    assert params.stop_strings == ("x",)


def test_unset_fields_come_from_the_generation_config():
    raw = {"temperature": 0.6, "top_p": 0.9, "top_k": None, "do_sample": True, "eos_token_id": 2}
    resolved = SamplingParams(top_p=0.5).resolved(raw)
    assert (resolved.temperature, resolved.top_p, resolved.top_k) == (0.6, 0.5, 0)
    assert resolved.min_p == 0.0
    assert SamplingParams().resolved().temperature == 0.0
    assert SamplingParams(top_p=0.9).resolved().temperature == 1.0
    assert SamplingParams(seed=1).resolved({"do_sample": False}).temperature == 0.0
    assert SamplingParams().resolved({"do_sample": True}).temperature == 1.0
    assert resolved.resolved({"temperature": 9.0}) == resolved


def test_from_generation_config():
    raw = {"do_sample": False, "temperature": 0.6, "max_new_tokens": 7}
    made = SamplingParams.from_generation_config(raw)
    assert made.greedy
    assert made.max_tokens == 7
    assert SamplingParams.from_generation_config(raw, temperature=0.3).temperature == 0.3
    with pytest.raises(UsageError, match="temperature"):
        SamplingParams.from_generation_config({"temperature": -1})


def test_needs_no_torch():
    code = "import sys, llmfw.sampling_params, llmfw.request; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_start_of_prompt_logprobs_needs_prompt_logprobs():
    with pytest.raises(UsageError, match="prompt_logprobs is not set"):
        SamplingParams(prompt_logprobs_start=3)
    assert SamplingParams(prompt_logprobs=0, prompt_logprobs_start=3).first_prompt_row == 2
    assert SamplingParams(prompt_logprobs=0).first_prompt_row == 0
