"""Configurations keep transformers' values and names, and later starts do without transformers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from transformers import Gemma3Config, GPT2Config, LlamaConfig, Mamba2Config

from llmfw.config import PretrainedConfig, pretrained_config_from, read_config_json
from llmfw.errors import ConfigError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMFW_CACHE", str(tmp_path))
    return tmp_path


def test_values_are_transformers_own_with_defaults_and_upgrades():
    raw = {"model_type": "llama", "hidden_size": 64, "rope_theta": 5.0, "torch_dtype": "bfloat16"}
    ours, theirs = pretrained_config_from(raw), LlamaConfig.from_dict(raw)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope_parameters == theirs.rope_parameters == ours.rope_scaling
    assert ours.dtype == ours.torch_dtype == "bfloat16"
    assert ours.head_dim == theirs.head_dim
    assert getattr(ours, "sliding_window", None) is None
    with pytest.raises(AttributeError, match="no field 'spiral'"):
        _ = ours.spiral
    assert ours.to_dict()["hidden_size"] == 64


def test_aliases_and_parts_are_kept():
    gpt2 = pretrained_config_from(GPT2Config(n_embd=32, n_layer=3).to_dict())
    assert (gpt2.hidden_size, gpt2.n_embd, gpt2.num_hidden_layers) == (32, 32, 3)
    gpt2.hidden_size = 48
    assert gpt2.n_embd == 48
    raw = Gemma3Config(text_config={"hidden_size": 24}).to_dict()
    wrapped = pretrained_config_from(raw)
    assert wrapped.text_config.hidden_size == wrapped.get_text_config().hidden_size == 24
    assert isinstance(wrapped.text_config, PretrainedConfig)
    assert gpt2.get_text_config() is gpt2


def test_the_second_reading_is_equal_and_comes_from_the_cache(own_cache):
    raw = GPT2Config(n_embd=32).to_dict()
    first = pretrained_config_from(raw)
    (kept,) = (own_cache / "configs").glob("*.json")
    assert pretrained_config_from(raw) == first
    kept.write_text("{ half")
    assert pretrained_config_from(raw) == first
    assert json.loads(kept.read_text())["names"][0]["hidden_size"] == "n_embd"


def test_fields_that_follow_from_others_are_read_and_not_written():
    made = pretrained_config_from({"model_type": "mamba", "num_hidden_layers": 3})
    assert made.layer_types == ["linear_attention"] * 3
    assert "layer_types" not in made.to_dict()
    again = pretrained_config_from(made.to_dict())
    assert again.to_dict() == made.to_dict()


def test_numbers_that_json_lacks_are_read_as_transformers_writes_them(tmp_path):
    Mamba2Config(time_step_limit=(0.0, float("inf"))).save_pretrained(tmp_path)
    raw = read_config_json(tmp_path)
    assert raw["time_step_limit"] == [0.0, float("inf")]
    assert pretrained_config_from(raw).time_step_limit == [0.0, float("inf")]
    (tmp_path / "config.json").write_text('{"a": {"__float__": "x"}, "b": Infinity}')
    assert read_config_json(tmp_path) == {"a": {"__float__": "x"}, "b": float("inf")}


def test_a_later_start_imports_no_transformers(own_cache):
    code = (
        "import sys; from llmfw.config import pretrained_config_from as f;"
        "print(f({'model_type': 'llama', 'hidden_size': 64}).hidden_size,"
        " 'transformers' in sys.modules)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert [run.stdout.split() for run in runs] == [["64", "True"], ["64", "False"]]


def test_without_a_writable_cache_it_still_reads(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMFW_CACHE", str(tmp_path / "file"))
    assert pretrained_config_from({"model_type": "llama", "hidden_size": 64}).hidden_size == 64


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"model_type": "spiral"}, "no configuration for model_type 'spiral'"),
        ({}, "no configuration for model_type None"),
        ({"model_type": "llama", "hidden_size": "wide"}, "not a valid llama configuration"),
    ],
)
def test_what_transformers_refuses_is_told(raw, words):
    with pytest.raises(ConfigError, match=words):
        pretrained_config_from(raw)
