"""The README's model of your own: as short as it says, and equal to transformers' model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import GraniteConfig

import line_count
import test_docs
from llmfw.plugins.local import load_plugin_module, unregister_local
from parity import assert_same_logits, ours_from, random_prompts, tiny_hf

ARCHITECTURE = "GraniteForCausalLM"


@pytest.fixture
def source() -> str:
    """The plugin file as the README has it."""
    blocks = test_docs.blocks_of(test_docs.ROOT / "README.md", "python")
    (text,) = (block.text for block in blocks if block.text.startswith("# my_granite.py\n"))
    return text


@pytest.fixture
def plugin(source: str, tmp_path: Path) -> Iterator[None]:
    """The plugin, loaded from a file as `--plugin-module` does it."""
    file = tmp_path / "my_granite.py"
    file.write_text(source, "utf-8")
    load_plugin_module(file)
    yield
    unregister_local(ARCHITECTURE)


def test_it_has_at_most_20_lines(source: str) -> None:
    assert line_count.count_source(source) <= 20


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize("tied", [True, False])
def test_against_hf_granite(tied: bool) -> None:
    config = GraniteConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_multiplier=0.3,
        embedding_multiplier=1.5,
        residual_multiplier=0.7,
        logits_scaling=2.0,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
    )
    hf = tiny_hf(config, ARCHITECTURE)
    prompts = random_prompts(4, config.vocab_size, 8, 40)
    assert_same_logits(hf, ours_from(hf), prompts)
