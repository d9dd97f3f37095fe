"""`llmfw inspect`: the configuration, the plugin, and the plan of loading from headers alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli_helpers import CONFIG, run, write_tiny_model
from llmfw.plugins import unregister_local


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tiny model's checkpoint; its head is tied."""
    hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    assert isinstance(hidden, int)
    assert isinstance(inner, int)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (int(str(CONFIG["vocab_size"])), hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(int(str(CONFIG["num_hidden_layers"]))):
        within = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (hidden // 2, hidden),
            "self_attn.v_proj": (hidden // 2, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in within.items()}
    return shapes


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[Path]:
    import torch
    from safetensors.torch import save_file

    folder = write_tiny_model(tmp_path)
    tensors = {name: torch.zeros(shape) for name, shape in tensor_shapes().items()}
    save_file(tensors, str(folder / "model.safetensors"))
    yield folder
    unregister_local("TinyForCausalLM")


def inspect(folder: Path, *more: str) -> list[str]:
    return ["inspect", str(folder), "--plugin-module", str(folder / "plugin.py"), *more]


def test_the_configuration_and_the_plugin(checkpoint: Path) -> None:
    done = run(*inspect(checkpoint))
    assert done.exit_code == 0, done.stderr
    facts, config = done.stdout.split("\nconfig.json\n")
    lines = dict(line.split(maxsplit=1) for line in facts.splitlines())
    assert lines["architecture"] == "TinyForCausalLM"
    assert lines["dtype"] == "float32"
    assert "local plugin" in facts
    assert "  hidden_size " in config
    assert "weights" not in config


def test_the_plan_accounts_for_every_tensor(checkpoint: Path) -> None:
    done = run(*inspect(checkpoint, "--weights", "--json"))
    assert done.exit_code == 0, done.stderr
    value = json.loads(done.stdout)
    assert value["config"] == CONFIG
    rows = value["weights"]
    assert {row["tensor"] for row in rows if row["tensor"]} == set(tensor_shapes())
    assert "tied to model.embed_tokens.weight" in {row["note"] for row in rows}
    table = run(*inspect(checkpoint, "--weights")).stdout
    assert "model.layers.1.mlp.gate_up_proj.weight" in table


def test_what_does_not_fit_is_one_error(checkpoint: Path) -> None:
    config = {**CONFIG, "intermediate_size": 48}
    (checkpoint / "config.json").write_text(json.dumps(config), "utf-8")
    done = run(*inspect(checkpoint, "--weights"))
    assert done.exit_code == 5
    assert done.stdout == ""
    assert "gate_proj" in done.stderr
    assert run(*inspect(checkpoint)).exit_code == 0, "without --weights nothing is planned"


def test_a_truncated_file_is_a_checkpoint_error(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    done = run(*inspect(checkpoint, "--weights"))
    assert done.exit_code == 4
    assert "model.safetensors" in done.stderr
