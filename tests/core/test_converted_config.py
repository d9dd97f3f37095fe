"""config.json of a converted checkpoint: what it says, and what is refused of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmfw.config import QuantConfig
from llmfw.errors import ConfigError
from llmfw.weights.converted_config import (
    ConvertedConfig,
    LossyStep,
    PluginIdentity,
    SourceSummary,
    is_converted,
    read_converted_config,
)

CONFIG = ConvertedConfig(
    architecture="AnyForCausalLM",
    dtype="bfloat16",
    plugin=PluginIdentity("llmfw-any", "1.2"),
    core_version="0.1",
    source=SourceSummary("model", "directory", "sha256:1"),
    tp_size=2,
    quantization=QuantConfig(exclude_modules=("lm_head",)),
    converted_dtype="bfloat16",
    layouts=("sha256:2", "sha256:3"),
    parameter_dtypes={"a.weight": "float32"},
    ties={"b": "a"},
    lossy=(LossyStep("dtype", "1 tensor from F32 to bfloat16"),),
    left_behind=("original/",),
)


def written(folder: Path, **changes: Any) -> Path:
    raw = {**json.loads(CONFIG.to_json()), **changes}
    values = {name: value for name, value in raw.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_converted_config(written(tmp_path)) == CONFIG
    assert is_converted(tmp_path)


def test_other_directories_are_none(tmp_path: Path) -> None:
    assert not is_converted(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert not is_converted(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert not is_converted(tmp_path)


def test_optional_fields_may_be_left_out(tmp_path: Path) -> None:
    names = ("layouts", "parameter_dtypes", "ties", "lossy", "left_behind", "converted_dtype")
    none = dict.fromkeys((*names, "quantization"), ...)
    config = read_converted_config(written(tmp_path, **none))
    assert (config.layouts, config.lossy, config.quantization) == ((), (), QuantConfig())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"format_version": 2}, "format_version 2 is not known here, 1 is"),
        ({"plugin": ...}, "KeyError: 'plugin'"),
        ({"plugin": {"name": "x"}}, "TypeError"),
        ({"mapping": {"world_size": 3, "tp_size": 2, "pp_size": 1}}, "ValueError: mapping"),
        ({"mapping": {"world_size": 0, "tp_size": 0, "pp_size": 1}}, "ValueError: mapping"),
        ({"layouts": ["sha256:2"]}, "1 layouts for 2 ranks"),
        ({"parameter_dtypes": {"a": "float99"}}, "AttributeError"),
        ({"quantization": {"quant_algo": "fp8"}}, r"its weights are quantised \(fp8\)"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        read_converted_config(written(tmp_path, **changes))
    assert "convert the model" in str(caught.value.hint)
