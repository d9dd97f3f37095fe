"""Shared by the parity tests: a tiny random transformers model beside ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM

from llmfw.config import ModelConfig, text_config
from llmfw.models import DecoderModelForCausalLM, build
from llmfw.models.build import CoreDefaults
from llmfw.plugins import PluginHost, resolve_plugin
from llmfw.testing import PackedSession
from llmfw.testing.compare import ATOL, REAL_TIE, TINY_TIE, random_prompts
from llmfw.testing.compare import reference_logits as hf_logits
from llmfw.testing.compare import require_greedy as assert_greedy
from llmfw.testing.reference import randomize
from llmfw.weights import (
    Checkpoint,
    MemoryCheckpoint,
    load_weights,
    open_checkpoint,
    plan_weights,
)

__all__ = [
    "ATOL",
    "NORMALISES_GROUPS",
    "REAL_TIE",
    "TINY_TIE",
    "assert_greedy",
    "assert_same_logits",
    "hf_logits",
    "ours_from",
    "published",
    "random_prompts",
    "tiny_hf",
]

#: Whether transformers' Mamba-2 normalises each group of features by itself, as mamba_ssm does and
#: models of several groups were trained (Codestral Mamba); before 5.23 its torch path does not.
NORMALISES_GROUPS = Version(transformers.__version__) >= Version("5.23")


def tiny_hf(config: Any, architecture: str, attention: str = "sdpa") -> torch.nn.Module:
    """A random transformers model of `config`, float32, with weights large enough to tell.

    `attention` is transformers' implementation; "eager" for what its "sdpa" cannot do (soft caps).
    """
    config.architectures = [architecture]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=attention
    )
    randomize(model)
    return model.eval()


def ours_from(
    hf: torch.nn.Module,
    *,
    checkpoint: Checkpoint | None = None,
    max_model_len: int | None = None,
    **settings: Any,
) -> DecoderModelForCausalLM[Any, Any]:
    """Our model of the same architecture, through its plugin, filled from the state dict.

    `checkpoint` is what it is filled from instead, such as a `published` one.
    """
    config = hf.config
    resolved = resolve_plugin(config.architectures[0])
    host = PluginHost(resolved.plugin, name=resolved.label, defaults=CoreDefaults())
    model_config: ModelConfig[Any] = ModelConfig(
        pretrained_config=config,
        max_model_len=max_model_len or text_config(config).max_position_embeddings,
        block_size=4,
        **settings,
    )
    model = build(model_config, host)
    if checkpoint is None:
        checkpoint = MemoryCheckpoint({k: v.clone() for k, v in hf.state_dict().items()})
    weight_map = host.hook.llmfw_weight_map(model_config=model_config, checkpoint=checkpoint)
    plan = plan_weights(model, checkpoint, weight_map, model_config.mapping)
    load_weights(model, plan, checkpoint)
    return model


def published(hf: torch.nn.Module, folder: Path) -> Checkpoint:
    """The model as transformers publishes it: its names on disk can differ from those in memory."""
    hf.save_pretrained(folder)
    return open_checkpoint(folder)


def assert_same_logits(
    hf: torch.nn.Module, model: DecoderModelForCausalLM[Any, Any], prompts: list[list[int]]
) -> None:
    """A ragged prefill, chunks and single decode steps all give transformers' logits."""
    expected = [hf_logits(hf, ids) for ids in prompts]
    ragged = PackedSession(model, num_blocks=256).step({str(i): p for i, p in enumerate(prompts)})
    for index, want in enumerate(expected):
        torch.testing.assert_close(ragged[str(index)], want, atol=ATOL, rtol=0)
    session = PackedSession(model, num_blocks=256)
    ids, want = prompts[0], expected[0]
    cut, tail = len(ids) // 2, len(ids) - 3
    pieces = [ids[:cut], ids[cut:tail], *([token] for token in ids[tail:])]
    got = torch.cat([session.step({"a": piece})["a"] for piece in pieces if piece])
    torch.testing.assert_close(got, want, atol=ATOL, rtol=0)
