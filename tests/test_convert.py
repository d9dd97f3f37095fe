"""Convert and export: the same model to run, and every byte of its files back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli_helpers import run
from converting import LLAMA, files_of, logits_of, written
from gguf_files import decoder_tensors, write_gguf
from llmfw import Mapping
from llmfw.errors import CheckpointError, ConfigError, UsageError
from llmfw.models import load_model
from llmfw.models.convert import convert_checkpoint
from llmfw.models.export import export_checkpoint
from llmfw.weights import open_checkpoint
from published_layouts import LAYOUTS, tensors_of, write

# Dense decoders of stock layers; those of others are not cut yet, and say so.
CUT = [
    *(
        f"{name}ForCausalLM"
        for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi", "Phi3", "OPT")
    ),
    *(f"Gemma{number}ForCausalLM" for number in ("", 2, 3)),
    "GPT2LMHeadModel",
    "GPTNeoXForCausalLM",
]
# One with biases, one transposed and fused, one fused, one that is not cut.
FEW = ["Qwen2ForCausalLM", "GPT2LMHeadModel", "Phi3ForCausalLM", "MixtralForCausalLM"]
IGNORING = "GPTNeoXForCausalLM"


def slow(architecture: str) -> Any:
    return pytest.param(architecture, marks=pytest.mark.slow)


@pytest.fixture(params=LAYOUTS)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_it_runs_alike_and_comes_back_byte_for_byte(architecture: str, tmp_path: Path):
    source = written(architecture, tmp_path / "source")
    report = convert_checkpoint(source, tmp_path / "converted")
    assert report.config.lossy == ()
    assert report.config.left_behind == ()
    assert torch.equal(logits_of(tmp_path / "converted"), logits_of(source))
    back = export_checkpoint(tmp_path / "converted", tmp_path / "back")
    assert back.identical
    assert files_of(tmp_path / "back") == files_of(source)


def test_a_single_file_comes_back_too(tmp_path: Path):
    source = written(LLAMA, tmp_path / "source")
    tensors = dict(tensors_of(LLAMA))
    for path in source.glob("model*"):
        path.unlink()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt", "by": "them"})
    convert_checkpoint(source, tmp_path / "converted")
    export_checkpoint(tmp_path / "converted", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(source)


def test_tensors_of_several_dtypes_come_back(tmp_path: Path):
    """Parts of one parameter are kept in the dtype that holds them all."""
    source = tmp_path / "source"
    tensors = tensors_of(LLAMA)
    name = "model.layers.1.self_attn.{}_proj.weight"
    tensors[name.format("k")] = tensors[name.format("k")].float()
    tensors[name.format("v")] = tensors[name.format("v")].half()
    write(LLAMA, source, tensors)
    report = convert_checkpoint(source, tmp_path / "converted")
    assert report.config.lossy == ()
    fused = load_file(tmp_path / "converted" / "rank0.safetensors")
    assert fused["model.layers.1.self_attn.qkv_proj.weight"].dtype == torch.float32
    assert export_checkpoint(tmp_path / "converted", tmp_path / "back").identical
    assert files_of(tmp_path / "back") == files_of(source)


@pytest.mark.parametrize("architecture", FEW + [slow(name) for name in CUT if name not in FEW])
def test_ranks_hold_parts_of_the_whole_and_come_back(architecture: str, tmp_path: Path):
    source = written(architecture, tmp_path / "source")
    two = Mapping(world_size=2, tp_size=2)
    if architecture not in CUT:
        with pytest.raises(ConfigError, match="rank"):
            convert_checkpoint(source, tmp_path / "two", mapping=two)
        return
    convert_checkpoint(source, tmp_path / "two", mapping=two)
    assert export_checkpoint(tmp_path / "two", tmp_path / "back").identical
    assert files_of(tmp_path / "back") == files_of(source)


def test_concatenated_ranks_are_the_whole(tmp_path: Path):
    """Columns lie below each other shard by shard, rows beside each other, the rest is in each."""
    source = written("Qwen2ForCausalLM", tmp_path / "source")
    convert_checkpoint(source, tmp_path / "one")
    two = Mapping(world_size=2, tp_size=2)
    convert_checkpoint(source, tmp_path / "two", mapping=two)
    whole = load_file(tmp_path / "one" / "rank0.safetensors")
    ranks = [load_file(tmp_path / "two" / f"rank{rank}.safetensors") for rank in (0, 1)]
    assert set(whole) == set(ranks[0]) == set(ranks[1])
    heads = {"qkv_proj.weight": (32, 16, 16), "qkv_proj.bias": (32, 16, 16)}
    shards = {**heads, "gate_up_proj.weight": (48, 48)}
    for name, value in whole.items():
        parts = [rank[name] for rank in ranks]
        kind = ".".join(name.split(".")[-2:])
        if kind in shards:
            halves = [part.split([rows // 2 for rows in shards[kind]]) for part in parts]
            both = [torch.cat(pair) for pair in zip(*halves, strict=True)]
            assert torch.equal(torch.cat(both), value), name
        elif kind in ("o_proj.weight", "down_proj.weight"):
            assert torch.equal(torch.cat(parts, dim=1), value), name
        else:
            assert torch.equal(parts[0], value), name
            assert torch.equal(parts[1], value), name


def test_a_checkpoint_of_several_ranks_is_refused_by_a_run_of_one(tmp_path: Path):
    source = written(LLAMA, tmp_path / "source")
    convert_checkpoint(source, tmp_path / "two", mapping=Mapping(world_size=2, tp_size=2))
    with pytest.raises(ConfigError, match="was converted for 2 tensor-parallel") as caught:
        load_model(tmp_path / "two")
    assert "convert the model again for one rank" in str(caught.value.hint)
    done = run("run", "--model", str(tmp_path / "two"), "hello")
    assert done.exit_code == ConfigError.exit_code
    assert "was converted for 2 tensor-parallel" in done.stderr


def test_a_rank_of_the_run_it_is_for_loads_its_file(tmp_path: Path):
    source = written(LLAMA, tmp_path / "source")
    two = Mapping(world_size=2, tp_size=2)
    convert_checkpoint(source, tmp_path / "two", mapping=two)
    second = Mapping(world_size=2, rank=1, tp_size=2)
    model = load_model(tmp_path / "two", mapping=second, kernels="reference").model
    loaded = model.get_parameter("model.layers.0.mlp.down_proj.weight")
    whole = open_checkpoint(source).tensor("model.layers.0.mlp.down_proj.weight")
    assert torch.equal(loaded, whole[:, 24:])


def test_another_dtype_is_recorded_and_told(tmp_path: Path):
    source = written(LLAMA, tmp_path / "source")
    done = run("convert", str(source), str(tmp_path / "half"), "--dtype", "float16", "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["dtype"] == "float16"
    assert told["lossy"] == [{"step": "dtype", "detail": "30 tensors from BF16 to float16"}]
    assert "lossy (dtype): 30 tensors from BF16 to float16" in done.stderr
    stored = load_file(tmp_path / "half" / "rank0.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert load_model(tmp_path / "half", kernels="reference").model_config.dtype == torch.float16
    done = run("export", str(tmp_path / "half"), str(tmp_path / "back"))
    assert done.exit_code == 0, done.stderr
    assert "lossy (dtype): 30 tensors from BF16 to float16" in done.stderr
    assert "not the source's" in done.stderr
    back = open_checkpoint(tmp_path / "back")
    for name, value in tensors_of(LLAMA).items():
        assert torch.equal(back.tensor(name), value.half()), name
        assert back.info(name).file == open_checkpoint(source).info(name).file
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "float16"
    assert torch.equal(logits_of(tmp_path / "back"), logits_of(tmp_path / "half"))


def test_the_dtype_that_it_has_is_no_loss(tmp_path: Path):
    source = written(LLAMA, tmp_path / "source")
    report = convert_checkpoint(source, tmp_path / "same", dtype="bfloat16")
    assert report.config.lossy == ()
    assert export_checkpoint(tmp_path / "same", tmp_path / "back").identical


def test_a_run_may_ask_for_another_dtype_than_the_checkpoints(tmp_path: Path):
    source = written(LLAMA, tmp_path / "source")
    convert_checkpoint(source, tmp_path / "converted")
    ours = logits_of(tmp_path / "converted", dtype="float32")
    assert torch.equal(ours, logits_of(source, dtype="float32"))


def test_ignored_tensors_may_be_dropped_which_is_told(tmp_path: Path):
    source = written(IGNORING, tmp_path / "source")
    report = convert_checkpoint(source, tmp_path / "converted", keep_ignored=False)
    assert [step.step for step in report.config.lossy] == ["ignored"]
    assert not (tmp_path / "converted" / "ignored.safetensors").exists()
    back = export_checkpoint(tmp_path / "converted", tmp_path / "back")
    assert not back.identical
    left = set(tensors_of(IGNORING)) - set(open_checkpoint(tmp_path / "back").names())
    assert left == set(LAYOUTS[IGNORING].ignored)
    assert torch.equal(logits_of(tmp_path / "back"), logits_of(source))


def test_a_gguf_file_becomes_a_checkpoint_and_says_what_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LLMFW_CACHE", str(tmp_path / "cache"))
    file = write_gguf(tmp_path / "model.gguf", decoder_tensors())
    report = convert_checkpoint(file, tmp_path / "converted")
    assert [step.step for step in report.config.lossy] == ["gguf"]
    assert torch.equal(logits_of(tmp_path / "converted"), logits_of(file))
    export_checkpoint(tmp_path / "converted", tmp_path / "back")
    assert torch.equal(logits_of(tmp_path / "back"), logits_of(file))


def test_what_does_not_travel_is_told(tmp_path: Path):
    source = written(LLAMA, tmp_path / "source")
    (source / "original").mkdir()
    (source / "pytorch_model.bin").write_bytes(b"x")
    (source / "consolidated.safetensors").write_bytes(b"x")
    (source / ".cache").mkdir()
    report = convert_checkpoint(source, tmp_path / "converted")
    left = ("consolidated.safetensors", "original/", "pytorch_model.bin")
    assert report.config.left_behind == left


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--quantize", "fp8"), "--quantize fp8: weights are not quantised here yet"),
        (("--pp", "2"), "2 pipeline stages: models are not cut into stages yet"),
        (("--tp", "3"), "do not divide"),
        (("--dtype", "int7"), "dtype 'int7' is not one that models run in"),
    ],
)
def test_what_is_not_served_is_refused_by_name(options: tuple[str, ...], told: str, tmp_path: Path):
    source = written(LLAMA, tmp_path / "source")
    done = run("convert", str(source), str(tmp_path / "out"), *options)
    assert done.exit_code in (UsageError.exit_code, ConfigError.exit_code)
    assert told in done.stderr
    assert not (tmp_path / "out").exists()


def test_converted_checkpoints_are_not_converted_again(tmp_path: Path):
    source = written(LLAMA, tmp_path / "source")
    convert_checkpoint(source, tmp_path / "converted")
    with pytest.raises(UsageError, match="is a converted checkpoint already"):
        convert_checkpoint(tmp_path / "converted", tmp_path / "again")
    with pytest.raises(UsageError, match="is no converted checkpoint"):
        export_checkpoint(source, tmp_path / "back")
    with pytest.raises(CheckpointError, match="is there already"):
        convert_checkpoint(source, tmp_path / "converted")
