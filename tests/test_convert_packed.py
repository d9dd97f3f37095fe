"""Packed checkpoints stay packed when they are converted: the same model, and every byte back."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli_helpers import run
from converting import changed_config, files_of, logits_of
from llmfw import Mapping
from llmfw.errors import CheckpointError, WeightError
from llmfw.models import load_model
from llmfw.models.convert import convert_checkpoint
from llmfw.models.export import export_checkpoint
from llmfw.weights import open_checkpoint
from llmfw.weights.source_record import stored_of
from published_packed import PACKED, packed_deepseek, packed_gpt_oss, packed_llama

Pack = Callable[[Path], Path]
TWO = Mapping(world_size=2, tp_size=2)
EXPERTS = "model.layers.1.mlp.experts.down_proj"


@pytest.fixture(params=PACKED)
def pack(request: pytest.FixtureRequest) -> Pack:
    return PACKED[request.param]


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    stored = stored_of(open_checkpoint(folder))
    return {name: stored.tensor(name) for name in stored.names()}


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Bit by bit: torch compares no float8."""
    return ours.dtype == theirs.dtype and torch.equal(
        ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8)
    )


def test_it_stays_packed_runs_alike_and_comes_back_byte_for_byte(pack: Pack, tmp_path: Path):
    source, out = pack(tmp_path / "source"), tmp_path / "converted"
    report = convert_checkpoint(source, out)
    assert report.config.lossy == ()
    assert report.config.packed == open_checkpoint(source).format
    kept, original = load_file(out / "packed.safetensors"), stored_tensors(source)
    assert all(same(value, original[name]) for name, value in kept.items())
    endings = ("_blocks", "_scales", ".weight_scale_inv")
    packed = {name for name, value in original.items() if value.dtype.itemsize == 1}
    assert packed | {name for name in original if name.endswith(endings)} <= set(kept)
    assert torch.equal(logits_of(out), logits_of(source))
    assert torch.equal(logits_of(out, dtype="float32"), logits_of(source, dtype="float32"))
    assert export_checkpoint(out, tmp_path / "back").identical
    assert files_of(tmp_path / "back") == files_of(source)


def test_a_parameter_of_packed_and_other_tensors_is_kept_in_its_tensors(tmp_path: Path):
    source, out = packed_llama(tmp_path / "source"), tmp_path / "converted"
    convert_checkpoint(source, out)
    kept, ours = load_file(out / "packed.safetensors"), load_file(out / "rank0.safetensors")
    assert kept["model.layers.1.self_attn.k_proj.weight"].dtype == torch.bfloat16
    assert not any("proj" in name for name in ours)
    done = run("inspect", str(out), "--weights")
    row = next(line for line in done.stdout.splitlines() if "layers.1.mlp.down_proj" in line)
    assert "F8_E4M3, scaled by blocks" in row
    assert "packed.safetensors" in row


@pytest.mark.parametrize("pack", [packed_gpt_oss, packed_deepseek])
def test_another_dtype_dequantises_which_is_told(pack: Pack, tmp_path: Path):
    source, out = pack(tmp_path / "source"), tmp_path / "converted"
    report = convert_checkpoint(source, out, dtype="bfloat16")
    assert "packed" in {step.step for step in report.config.lossy}
    assert report.config.packed is None
    assert not (out / "packed.safetensors").exists()
    stored = load_file(out / "rank0.safetensors")
    assert {value.dtype for value in stored.values()} <= {torch.bfloat16, torch.float32}
    assert torch.equal(logits_of(out), logits_of(source))
    back = export_checkpoint(out, tmp_path / "back")
    assert not back.identical
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())
    assert torch.equal(logits_of(tmp_path / "back"), logits_of(source))


def test_packed_tensors_that_the_model_does_not_take_may_be_dropped(tmp_path: Path):
    source, out = packed_deepseek(tmp_path / "source"), tmp_path / "converted"
    report = convert_checkpoint(source, out, keep_ignored=False)
    assert [step.step for step in report.config.lossy] == ["ignored"]
    assert export_checkpoint(out, tmp_path / "back").identical is False
    original, back = stored_tensors(source), stored_tensors(tmp_path / "back")
    assert set(back) == {name for name in original if ".layers.3." not in name}
    assert all(same(value, original[name]) for name, value in back.items())
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "fp8"
    assert torch.equal(logits_of(tmp_path / "back"), logits_of(source))


def test_ranks_share_the_packed_tensors_and_cut_them_when_they_load(tmp_path: Path):
    source, out = packed_llama(tmp_path / "source"), tmp_path / "two"
    convert_checkpoint(source, out, mapping=TWO)
    assert export_checkpoint(out, tmp_path / "back").identical
    assert files_of(tmp_path / "back") == files_of(source)
    name = "model.layers.0.mlp.{}_proj.weight"
    whole = open_checkpoint(source)
    for rank in (0, 1):
        mapping = Mapping(world_size=2, rank=rank, tp_size=2)
        model = load_model(out, mapping=mapping, kernels="reference").model
        down = model.get_parameter(name.format("down"))
        rows = slice(24 * rank, 24 * rank + 24)
        assert torch.equal(down, whole.tensor(name.format("down"))[:, rows].to(down.dtype))
        gate, up = (whole.tensor(name.format(kind))[rows] for kind in ("gate", "up"))
        fused = model.get_parameter(name.format("gate_up"))
        assert torch.equal(fused, torch.cat((gate, up)).to(fused.dtype))


@pytest.mark.parametrize(
    ("pack", "name", "ranks"),
    [
        (packed_gpt_oss, f"{EXPERTS}_blocks", 1),
        (packed_gpt_oss, f"{EXPERTS}_scales", 1),
        (packed_deepseek, "model.layers.1.mlp.experts.2.down_proj.weight_scale_inv", 1),
        (packed_llama, "model.layers.1.self_attn.q_proj.weight", 1),
        (packed_llama, "model.layers.1.self_attn.q_proj.weight", 2),
    ],
)
def test_a_flipped_byte_is_noticed(pack: Pack, name: str, ranks: int, tmp_path: Path):
    source, out = pack(tmp_path / "source"), tmp_path / "converted"
    convert_checkpoint(source, out, mapping=Mapping(world_size=ranks, tp_size=ranks))
    file = out / "packed.safetensors"
    info = stored_of(open_checkpoint(file)).info(name)
    content = bytearray(file.read_bytes())
    content[info.offset + info.nbytes - 3] ^= 4  # of the last rows: another rank's
    file.write_bytes(content)
    first = Mapping(world_size=ranks, tp_size=ranks)
    for use in (
        lambda: load_model(out, kernels="reference", mapping=first),
        lambda: export_checkpoint(out, tmp_path / "back"),
    ):
        with pytest.raises(CheckpointError, match=f"tensor '{name}' is not what was written"):
            use()


def test_another_version_that_maps_alike_reads_them_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    source, out = packed_gpt_oss(tmp_path / "source"), tmp_path / "converted"
    convert_checkpoint(source, out)
    changed_config(out, plugin={"distribution": "llmfw-gptoss", "version": "0.0.1"})
    with caplog.at_level(logging.INFO, "llmfw.models"):
        assert torch.equal(logits_of(out), logits_of(source))
    assert "and fill alike" in caplog.text
    changed_config(out, layouts=["sha256:of-another-plan"])
    with pytest.raises(WeightError, match=r"was made with llmfw-gptoss 0\.0\.1"):
        load_model(out)


def test_what_is_needed_to_read_them_is_asked_for(tmp_path: Path):
    out = tmp_path / "converted"
    convert_checkpoint(packed_gpt_oss(tmp_path / "source"), out)
    record = json.loads((out / "source.json").read_text())
    changed_config(out, packed="nf4")
    with pytest.raises(CheckpointError, match=r"keeps nf4 tensors packed, and no source\.json"):
        load_model(out)
    (out / "source.json").write_text(json.dumps({**record, "format": "nf4"}))
    with pytest.raises(CheckpointError, match="weights packed as 'nf4' are not known here"):
        load_model(out)
    changed_config(out, packed="mxfp4")
    (out / "source.json").write_text(json.dumps(record))
    tensors = load_file(out / "packed.safetensors")
    lost = {name: value for name, value in tensors.items() if not name.startswith(EXPERTS)}
    save_file(lost, out / "packed.safetensors")
    with pytest.raises(WeightError, match=f"missing +{EXPERTS.replace('.', '[.]')}"):
        load_model(out)
