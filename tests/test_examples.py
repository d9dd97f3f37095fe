"""docs/examples: they run as they stand, and the plugins that the tutorial speaks of are right."""

from __future__ import annotations

import json
import shutil
import sys
from difflib import SequenceMatcher
from importlib import import_module, invalidate_caches
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from cli_helpers import run, write_tiny_model
from llmfw.models import load_model
from llmfw.plugins import load_plugin_module, register_local, unregister_local
from llmfw.weights import open_checkpoint
from parity import assert_same_logits, ours_from, random_prompts, tiny_hf
from test_cli_new import GROUPED, LATENTS, MIXTURES, SIZES
from test_plugin_template import command

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "docs" / "examples"
TUTORIAL = ROOT / "docs" / "plugins" / "tutorial.md"
ARCHITECTURE = "MyModelForCausalLM"

# Architectures without a built-in plugin: their fields, and the folder of what is written by hand.
NEW_MODELS: dict[str, tuple[dict[str, Any], str | None]] = {
    "SmolLM3ForCausalLM": ({**GROUPED, "num_hidden_layers": 4}, "smollm3"),
    "StableLmForCausalLM": (GROUPED, None),
    "GPTJForCausalLM": ({"rotary_dim": 8}, None),
    "CodeGenForCausalLM": ({"rotary_dim": 8}, "codegen"),
    "BloomForCausalLM": ({"n_layer": 2, "n_head": 4}, "bloom"),
    "CohereForCausalLM": (GROUPED, None),
    "FalconForCausalLM": ({}, None),
    "GPTBigCodeForCausalLM": ({}, None),
    "Starcoder2ForCausalLM": (GROUPED, None),
    "Olmo2ForCausalLM": (GROUPED, None),
    "OlmoeForCausalLM": (MIXTURES["olmoe"][0], None),
    "GraniteMoeSharedForCausalLM": (MIXTURES["granitemoeshared"][0], None),
    "Glm4MoeForCausalLM": (MIXTURES["glm4_moe"][0], None),
    "Glm4MoeLiteForCausalLM": (LATENTS["glm4_moe_lite"][0], None),
    "MiniCPM3ForCausalLM": (LATENTS["minicpm3"][0], None),
    "MiniMaxM2ForCausalLM": (MIXTURES["minimax_m2"][0], None),
}
MODEL_TYPES = {
    **{name: name.removesuffix("ForCausalLM").lower() for name in NEW_MODELS},
    "GPTBigCodeForCausalLM": "gpt_bigcode",
    "Glm4MoeForCausalLM": "glm4_moe",
    "Glm4MoeLiteForCausalLM": "glm4_moe_lite",
    "MiniMaxM2ForCausalLM": "minimax_m2",
}


@pytest.fixture
def mymodel(tmp_path: Path) -> Path:
    """A tiny random checkpoint of the single file's model, with names as that file expects them."""
    folder = write_tiny_model(tmp_path / "mymodel")
    raw = json.loads((folder / "config.json").read_text("utf-8"))
    raw["architectures"] = [ARCHITECTURE]
    (folder / "config.json").write_text(json.dumps(raw), "utf-8")
    load_plugin_module(EXAMPLES / "single_file" / "modeling_mymodel.py")
    try:
        loaded = load_model(folder, load_format="dummy", device="cpu")
        tensors = {
            name.replace("model.", "my.", 1): value.detach().clone()
            for name, value in loaded.model.named_parameters()
            if name != "lm_head.weight"
        }
    finally:
        unregister_local(ARCHITECTURE)
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_model_in_a_file_next_to_a_script(mymodel: Path) -> None:
    told = command(EXAMPLES / "single_file", "main.py", mymodel)
    assert len(told.split()) == 8


def test_the_same_file_on_the_command_line(mymodel: Path) -> None:
    file = EXAMPLES / "single_file" / "modeling_mymodel.py"
    prompt = ("--prompt", "hello world", "--max-tokens", "4", "--device", "cpu")
    try:
        done = run("run", "--model", str(mymodel), "--plugin-module", str(file), *prompt, "--json")
    finally:
        unregister_local(ARCHITECTURE)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["plugin"].startswith("local plugin")


def plugin_for(architecture: str, folder: Path) -> tuple[Path, torch.nn.Module, int]:
    """The written plugin with its edits, transformers' model, and how many lines are by hand."""
    fields, edits = NEW_MODELS[architecture]
    config = CONFIG_MAPPING[MODEL_TYPES[architecture]](**{**SIZES, **fields})
    eager = architecture in ("GPTJForCausalLM", "CodeGenForCausalLM", "BloomForCausalLM")
    hf = tiny_hf(config, architecture, attention="eager" if eager else "sdpa")
    hf.save_pretrained(folder / "model")
    done = run("new", "--from", str(folder / "model"), "--output", str(folder), "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["agrees"] == (edits is None)
    (package,) = Path(told["path"]).glob("src/*_plugin")
    by_hand = 0
    for edited in sorted((EXAMPLES / edits).glob("*.py")) if edits else ():
        by_hand += written_by_hand(package / edited.name, edited)
        shutil.copy(edited, package / edited.name)
    return package, hf, by_hand


def written_by_hand(before: Path, after: Path) -> int:
    """Lines of code in `after` that `before` lacks; another indentation is nobody's handwriting."""
    old, new = (
        [line.strip() for line in path.read_text("utf-8").splitlines()] for path in (before, after)
    )
    changes = SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    added = [line for tag, _, _, a, b in changes if tag != "equal" for line in new[a:b]]
    return sum(1 for line in added if line and not line.startswith("#"))


@pytest.mark.parametrize("architecture", NEW_MODELS)
def test_a_plugin_from_a_checkpoint_is_right(architecture: str, tmp_path: Path) -> None:
    package, hf, by_hand = plugin_for(architecture, tmp_path)
    sys.path.insert(0, str(package.parent))
    invalidate_caches()
    try:
        register_local(architecture, import_module(package.name).plugin, str(package))
        ours = ours_from(hf, checkpoint=open_checkpoint(tmp_path / "model"))
        assert_same_logits(hf, ours, random_prompts(3, 128, 10, 60))
    finally:
        unregister_local(architecture)
        sys.path.remove(str(package.parent))
        for name in [name for name in sys.modules if name.split(".")[0] == package.name]:
            del sys.modules[name]
    assert f"| `{architecture}` |" in TUTORIAL.read_text("utf-8")
    row = next(r for r in TUTORIAL.read_text("utf-8").splitlines() if f"`{architecture}`" in r)
    assert f"| {by_hand} |" in row, f"{by_hand} lines are written by hand"
