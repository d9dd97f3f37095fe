"""The command line in tests: a runner, and a tiny checkpoint that answers in milliseconds."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from llmfw_cli.app import app

WORDS = ["<unk>", "<s>", "</s>", "hello", "world", "one", "two", "three", "user", "assistant"]
CONFIG = {
    "architectures": ["TinyForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": len(WORDS),
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)
PLUGIN = """
import sys
from llmfw.plugins import register_local
register_local("TinyForCausalLM", object(), __file__)
"""


def run(*arguments: str, **more: Any) -> Result:
    """Run `llmfw` in this process, which keeps its logging as it was."""
    logger = logging.getLogger("llmfw")
    level, handlers = logger.level, list(logger.handlers)
    try:
        return CliRunner().invoke(app, list(arguments), **more)
    finally:
        logger.setLevel(level)
        logger.handlers = handlers


def write_tiny_model(folder: Path) -> Path:
    """A directory with a config and a tokenizer of ten words, for --load-format dummy.

    Its architecture is served by `plugin.py` in the same directory: no installed family is needed.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "</s>", "bos_token": "<s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    (folder / "config.json").write_text(json.dumps(CONFIG), "utf-8")
    (folder / "plugin.py").write_text(PLUGIN, "utf-8")
    return folder


def tiny_arguments(folder: Path) -> list[str]:
    """What `run`, `chat` and `bench` need to answer with the tiny model."""
    return [
        *("--model", str(folder), "--plugin-module", str(folder / "plugin.py")),
        *("--load-format", "dummy", "--kernels", "reference", "--device", "cpu"),
    ]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's directory."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))
