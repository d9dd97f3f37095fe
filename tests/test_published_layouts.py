"""Each family's published layout goes through `inspect --weights`; what is wrong has a name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from cli_helpers import run
from llmfw.errors import CheckpointError, WeightError
from llmfw.models import load_model
from llmfw.models.convert import convert_checkpoint
from llmfw.testing import PackedSession
from llmfw.weights.mxfp4 import dequantise_mxfp4
from published_layouts import LAYOUTS, tensors_of, write
from published_mxfp4 import blocks_and_scales

# How a row says that a parameter is made of several tensors.
RANGE = re.compile(r"(?P<first>\S+) \.\. (?P<last>\S+) \((?P<count>\d+)\)")
EXPERT = "model.layers.1.mlp.experts.2.down_proj.weight"
OUTPUT = "model.layers.1.self_attn.o_proj.weight"
MIXTRALS = "model.layers.1.{}.experts.2.w2.weight"
MAMBAS = ("backbone.layers.1.mixer.out_proj.weight", "model.layers.1.mixer.out_proj.weight")
# A tensor of the checkpoint, and the name that the error has for it.
LOST = {
    "GptOssForCausalLM": (OUTPUT, OUTPUT),
    "Qwen2MoeForCausalLM": (EXPERT, EXPERT),
    "Qwen3MoeForCausalLM": (EXPERT, EXPERT),
    "MixtralForCausalLM": (MIXTRALS.format("block_sparse_moe"), MIXTRALS.format("mlp")),
    "DeepseekV2ForCausalLM": (EXPERT, EXPERT),
    "DeepseekV3ForCausalLM": (EXPERT, EXPERT),
    "Gemma3ForConditionalGeneration": (
        "language_model.model.layers.1.mlp.down_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    ),
    "MambaForCausalLM": MAMBAS,
    "FalconMambaForCausalLM": MAMBAS,
    "Mamba2ForCausalLM": MAMBAS,
    "PhiForCausalLM": ("model.layers.1.mlp.fc2.weight", "model.layers.1.mlp.down_proj.weight"),
    "OPTForCausalLM": ("model.decoder.layers.1.fc2.weight", "model.layers.1.fc2.weight"),
    "GPT2LMHeadModel": ("h.1.mlp.c_proj.weight", "model.layers.1.mlp.down_proj.weight"),
    "GPTNeoXForCausalLM": (
        "gpt_neox.layers.1.mlp.dense_4h_to_h.weight",
        "model.layers.1.mlp.down_proj.weight",
    ),
}
# What a surplus tensor is called where a rule has taken its prefix.
LOST_RENAMED = {
    "MambaForCausalLM": MAMBAS[1],
    "FalconMambaForCausalLM": MAMBAS[1],
    "Mamba2ForCausalLM": MAMBAS[1],
    "OPTForCausalLM": "model.layers.1.fc2.weight",
    "MixtralForCausalLM": MIXTRALS.format("mlp"),
    "Gemma3ForConditionalGeneration": "model.layers.1.mlp.down_proj.weight",
}


@pytest.fixture(params=LAYOUTS)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_plan_accounts_for_every_tensor(architecture: str, tmp_path: Path):
    write(architecture, tmp_path, tensors_of(architecture))
    done = run("inspect", str(tmp_path), "--weights", "--json")
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)["weights"]
    layout = LAYOUTS[architecture]
    told = {row["tensor"] for row in rows if row["tensor"]}
    ranges = {text: RANGE.fullmatch(text) for text in told}
    assert {text for text, several in ranges.items() if not several} <= set(layout.shapes())
    counts = [int(several["count"]) if several else 1 for several in ranges.values()]
    assert sum(counts) == len(layout.shapes())
    ignored = {row["tensor"] for row in rows if row["tensor"] and not row["parameter"]}
    assert ignored == set(layout.ignored)


def test_the_model_loads_and_runs(architecture: str, tmp_path: Path):
    write(architecture, tmp_path, tensors_of(architecture))
    loaded = load_model(tmp_path, kernels="reference", block_size=4)
    assert loaded.model_config.dtype == LAYOUTS[architecture].dtype
    logits = PackedSession(loaded.model).step({"a": [1, 2, 3, 4, 5]})["a"]
    assert logits.shape == (5, 64)
    assert bool(logits.isfinite().all())
    assert float(logits.float().std()) > 0


@pytest.mark.parametrize("case", ["removed", "renamed"])
def test_a_tensor_that_lacks_is_named(architecture: str, case: str, tmp_path: Path):
    """By the checkpoint's name where a rule wants it, else by the parameter's."""
    tensors = tensors_of(architecture)
    lost, told = LOST.get(architecture, ("model.layers.1.mlp.down_proj.weight",) * 2)
    value = tensors.pop(lost)
    if case == "renamed":
        tensors[lost.replace(".weight", "_.weight")] = value
    write(architecture, tmp_path, tensors)
    done = run("inspect", str(tmp_path), "--weights")
    assert done.exit_code == WeightError.exit_code
    lines = [" ".join(line.split()) for line in done.stderr.splitlines()]
    assert any(line.startswith(f"missing {told}:") for line in lines), done.stderr
    renamed = LOST_RENAMED.get(architecture, lost).replace(".weight", "_.weight")
    surplus = any(line.startswith(f"surplus {renamed}:") for line in lines)
    assert surplus == (case == "renamed"), done.stderr


def test_float8_weights_are_dequantised(tmp_path: Path):
    """As V3 is published: linear layers in float8, a scale for each block of (128, 128)."""
    architecture = "DeepseekV3ForCausalLM"
    plain, stored = tensors_of(architecture), {}
    for name, value in plain.items():
        linear = value.ndim == 2 and "layers" in name and "gate.weight" not in name
        if linear and "embed" not in name and "head" not in name:
            stored[name] = (value.float() * 100).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = torch.full((1, 1), 0.01)
            plain[name] = stored[name].float() * 0.01
        else:
            stored[name] = value
    for folder, tensors in (("plain", plain), ("stored", stored)):
        write(architecture, tmp_path / folder, tensors)
    logits = []
    for folder in ("plain", "stored"):
        loaded = load_model(tmp_path / folder, kernels="reference", block_size=4)
        logits.append(PackedSession(loaded.model).step({"a": [1, 2, 3, 4, 5]})["a"])
    assert torch.equal(*logits)
    done = run("inspect", str(tmp_path / "stored"), "--weights")
    assert "F8_E4M3, scaled by blocks" in done.stdout
    mixture = loaded.model.get_submodule("model.layers.1.mlp")
    assert mixture.experts.down_proj.dtype == torch.bfloat16
    assert mixture.gate.weight.dtype == mixture.e_score_correction_bias.dtype == torch.float32
    convert_checkpoint(tmp_path / "stored", tmp_path / "converted")
    loaded = load_model(tmp_path / "converted", kernels="reference", block_size=4)
    converted = PackedSession(loaded.model).step({"a": [1, 2, 3, 4, 5]})["a"]
    assert torch.equal(converted, logits[0])


def test_mxfp4_experts_are_dequantised(tmp_path: Path):
    """As gpt-oss is published: four-bit blocks and their scales in place of experts' matrices."""
    architecture = "GptOssForCausalLM"
    stored = {**tensors_of(architecture), **blocks_and_scales()}
    plain = dict(stored)
    for name in [name for name in stored if name.endswith("_blocks")]:
        stem = name.removesuffix("_blocks")
        blocks, scales = plain.pop(name), plain.pop(f"{stem}_scales")
        plain[stem] = dequantise_mxfp4(blocks, scales).transpose(1, 2).contiguous()
        del stored[stem]
    logits = []
    for folder, tensors in (("plain", plain), ("stored", stored)):
        write(architecture, tmp_path / folder, tensors)
        loaded = load_model(tmp_path / folder, kernels="reference", block_size=4)
        logits.append(PackedSession(loaded.model).step({"a": [1, 2, 3, 4, 5]})["a"])
    assert torch.equal(*logits)
    done = run("inspect", str(tmp_path / "stored"), "--weights")
    assert "MXFP4" in done.stdout
    assert "0 tensors ignored" in done.stdout
    convert_checkpoint(tmp_path / "stored", tmp_path / "converted")
    loaded = load_model(tmp_path / "converted", kernels="reference", block_size=4)
    converted = PackedSession(loaded.model).step({"a": [1, 2, 3, 4, 5]})["a"]
    assert torch.equal(converted, logits[0])
    scales = "model.layers.1.mlp.experts.down_proj_scales"
    write(architecture, tmp_path / "lone", {n: t for n, t in stored.items() if n != scales})
    done = run("inspect", str(tmp_path / "lone"), "--weights")
    assert done.exit_code == CheckpointError.exit_code
    assert f"down_proj_blocks has no {scales} beside it" in " ".join(done.stderr.split())


@pytest.mark.parametrize("command", ["run", "inspect", "convert"])
def test_weights_of_another_quantisation_are_refused_by_its_name(command: str, tmp_path: Path):
    architecture, source = "LlamaForCausalLM", tmp_path / "source"
    tensors = tensors_of(architecture).items()
    renamed = {name.replace("_proj.weight", "_proj.qweight"): value for name, value in tensors}
    write(architecture, source, renamed)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (source / "config.json").write_text(json.dumps(config))
    rest = {"run": ("--model", source, "hi"), "inspect": (source, "--weights")}
    done = run(command, *map(str, rest.get(command, (source, tmp_path / "out"))))
    assert done.exit_code == WeightError.exit_code
    assert "its weights are quantised by gptq; of quantised weights, MXFP4" in done.stderr
    assert "or as a GGUF file" in done.stderr
    assert "qweight" not in done.stderr
