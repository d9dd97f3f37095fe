"""Rotary frequencies and tables against transformers, for every scaling kind."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmfw.errors import ConfigError
from llmfw.layers import RopeParams
from llmfw.ops.reference import apply_rope

HALF = 8
SCALINGS = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {
        "short_factor": [1.0 + 0.1 * i for i in range(HALF)],
        "long_factor": [2.0 + i for i in range(HALF)],
        "original_max_position_embeddings": 64,
    },
}
YARN_VARIANTS = [
    {"mscale": 1.0, "mscale_all_dim": 0.7},
    {"attention_factor": 1.3},
    {"truncate": False},
    {"beta_fast": 16.0, "beta_slow": 2.0},
]


def config(**rope) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        head_dim=16,
        max_position_embeddings=256,
        rope_parameters={"rope_theta": 10000.0, **rope},
    )


def hf_inv_freq(cfg: LlamaConfig, seq_len: int | None) -> tuple[torch.Tensor, float]:
    kind = cfg.rope_parameters["rope_type"]
    return ROPE_INIT_FUNCTIONS[kind](cfg, torch.device("cpu"), seq_len=seq_len)


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("length", [32, 256, 500])
def test_frequencies_equal_transformers(kind: str, length: int):
    cfg = config(rope_type=kind, **SCALINGS[kind])
    ours = RopeParams.from_config(cfg)
    theirs, magnitude = hf_inv_freq(cfg, length)
    torch.testing.assert_close(ours.inv_freq(length), theirs, rtol=1e-6, atol=0)
    assert ours.magnitude == pytest.approx(magnitude)


@pytest.mark.parametrize("extra", YARN_VARIANTS)
def test_yarn_variants(extra: dict):
    cfg = config(rope_type="yarn", **SCALINGS["yarn"], **extra)
    theirs, magnitude = hf_inv_freq(cfg, None)
    ours = RopeParams.from_config(cfg)
    torch.testing.assert_close(ours.inv_freq(), theirs, rtol=1e-6, atol=0)
    assert ours.magnitude == pytest.approx(magnitude)


def test_longrope_takes_the_long_factors_past_the_original_length():
    ours = RopeParams.from_config(config(rope_type="longrope", **SCALINGS["longrope"]))
    assert not torch.equal(ours.inv_freq(64), ours.inv_freq(65))
    assert torch.equal(ours.inv_freq(65), ours.inv_freq(256))


class OldConfig:
    """As transformers before version 5 had it."""

    hidden_size = 64
    num_attention_heads = 4
    max_position_embeddings = 128
    rope_theta = 5000.0
    rope_scaling = None


def test_older_configurations_read_right():
    old = OldConfig()
    assert RopeParams.from_config(old) == RopeParams(dim=16, theta=5000.0, max_positions=128)
    old.rope_scaling = {"type": "linear", "factor": 2.0}
    assert RopeParams.from_config(old).rope_type == "linear"
    assert RopeParams.from_config(old).factor == 2.0
    old.rope_scaling = {"rope_type": "default"}
    assert RopeParams.from_config(old).rope_type == "default"
    old.partial_rotary_factor = 0.5
    assert RopeParams.from_config(old).dim == 8


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"rope_type": "spiral"}, "'spiral' is not known"),
        ({"dim": 7}, "7 is not a positive even number"),
        ({"rope_type": "linear"}, "needs a factor"),
        ({"rope_type": "longrope"}, "needs short_factor and long_factor"),
    ],
)
def test_wrong_parameters_are_refused(wrong: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        RopeParams(**{"dim": 16, **wrong})


def test_table_holds_cosines_then_sines():
    table = RopeParams(dim=4, theta=100.0).cos_sin(3)
    angles = torch.tensor([[0.0, 0.0], [1.0, 0.1], [2.0, 0.2]])
    torch.testing.assert_close(table, torch.cat((angles.cos(), angles.sin()), dim=-1))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_depends_only_on_distance_and_leaves_the_rest(interleaved: bool):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 12, generator=generator)
    table = RopeParams(dim=8).cos_sin(64)

    def score(i: int, j: int) -> float:
        cos_i, sin_i = table[i : i + 1].chunk(2, dim=-1)
        cos_j, sin_j = table[j : j + 1].chunk(2, dim=-1)
        rotated = apply_rope(q, cos_i, sin_i, interleaved)
        assert torch.equal(rotated[..., 8:], q[..., 8:])
        return float((rotated * apply_rope(k, cos_j, sin_j, interleaved)).sum())

    assert score(5, 2) == pytest.approx(score(45, 42), abs=1e-4)
    assert score(5, 2) != pytest.approx(score(5, 3), abs=1e-3)
