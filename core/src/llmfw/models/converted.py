"""What a model's preparation asks of a converted checkpoint."""

from __future__ import annotations

from pathlib import Path

from llmfw.config import Mapping
from llmfw.config.reading import architecture_of, read_config_json
from llmfw.errors import ConfigError
from llmfw.plugins import ResolvedPlugin
from llmfw.weights import ModelSource
from llmfw.weights.converted_config import ConvertedConfig, PluginIdentity, read_converted_config


def identity_of(resolved: ResolvedPlugin) -> PluginIdentity:
    """A plugin as a converted checkpoint names it."""
    if resolved.entry is not None:
        return PluginIdentity(resolved.entry.dist, resolved.entry.version)
    local = resolved.local
    assert local is not None
    digest = f"sha256:{local.sha256}" if local.sha256 else "unknown"
    return PluginIdentity(Path(local.origin).name, digest)


def converted_config(source: ModelSource, mapping: Mapping) -> ConvertedConfig | None:
    """The configuration of a converted checkpoint; None for any other model.

    Raises:
        ConfigError: If it cannot be read, names another architecture than the configuration that
            travelled along, or was made for another number of ranks.
    """
    if source.kind not in ("checkpoint", "engine"):
        return None
    config = read_converted_config(source.checkpoint_path)
    _same_architecture(source, config)
    wanted, here = (config.tp_size, config.pp_size), (mapping.tp_size, mapping.pp_size)
    if wanted != here:
        raise ConfigError(
            f"{source.checkpoint_path}: was converted for {_ranks(*wanted)}, this run has "
            f"{_ranks(*here)}",
            hint="convert the model again for one rank: llmfw convert MODEL OUT\n"
            "runs of several ranks come with a later version",
        )
    return config


def _same_architecture(source: ModelSource, config: ConvertedConfig) -> None:
    original = f"{source.model_dir}/config.json"
    architecture = architecture_of(read_config_json(source.model_dir), original)
    if architecture != config.architecture:
        raise ConfigError(
            f"{source.checkpoint_path}/config.json names the architecture "
            f"'{config.architecture}', {original} '{architecture}'",
            hint="one of them is damaged: copy the whole directory again, or convert the model "
            "again",
        )


def _ranks(tp_size: int, pp_size: int) -> str:
    if tp_size == pp_size == 1:
        return "one rank"
    return f"{tp_size} tensor-parallel x {pp_size} pipeline ranks"
