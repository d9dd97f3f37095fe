"""What the engine needs of any model, whatever it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch

from llmfw.attention.metadata import AttentionMetadata, CacheSpec
from llmfw.attention.state import StateSpec
from llmfw.config import Mapping as RankMapping
from llmfw.config import ModelConfig, TConfig
from llmfw.config.reading import text_config
from llmfw.errors import ConfigError, UsageError
from llmfw.layers.layer import Layer

TSelf = TypeVar("TSelf", bound="PretrainedModel[Any]")


@runtime_checkable
class StatefulLayer(Protocol):
    """A module that keeps something for each token."""

    layer_idx: int

    def cache_spec(self) -> CacheSpec:
        """What it keeps."""


@runtime_checkable
class RecurrentLayer(Protocol):
    """A module that keeps state of one size for each request."""

    layer_idx: int

    def state_spec(self) -> StateSpec:
        """What it keeps."""


class PretrainedModel(Layer, Generic[TConfig]):
    """Base of every model: tokens of a packed batch in, logits out.

    Args:
        config: The model's configuration.
    """

    def __init__(self, config: ModelConfig[TConfig]) -> None:
        super().__init__()
        self.model_config = config
        #: Token ids are below it; the configuration's unless the model says otherwise.
        self.vocab_size: int | None = getattr(
            text_config(config.pretrained_config), "vocab_size", None
        )
        self._came_from: tuple[str | Path, dict[str, Any]] | None = None

    @property
    def config(self) -> TConfig:
        """The pretrained configuration."""
        return self.model_config.pretrained_config

    def forward(
        self,
        attn_metadata: AttentionMetadata,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Logits of the packed batch: what a model has to define.

        Args:
            attn_metadata: The batch and the cache.
            input_ids: int64 [tokens].
            position_ids: int64 [tokens].
            **kwargs: Whatever the model passes down to its layers.

        Returns:
            [rows, vocab_size]: the rows of attn_metadata.logits_indices, all tokens when None.
        """
        raise ConfigError(
            f"{type(self).__name__} defines no forward",
            hint="define forward(attn_metadata, input_ids, position_ids), or derive from "
            "DecoderModelForCausalLM",
        )

    def cache_specs(self) -> dict[int, CacheSpec]:
        """What each layer keeps for each token, by layer index; empty without such state."""
        return {
            module.layer_idx: module.cache_spec()
            for module in self.modules()
            if isinstance(module, StatefulLayer)
        }

    def state_specs(self) -> dict[int, StateSpec]:
        """What each layer keeps for each request, by layer index; empty without such state.

        Raises:
            ConfigError: If two modules keep state under one layer index.
        """
        found: dict[int, StateSpec] = {}
        for name, module in self.named_modules():
            if not isinstance(module, RecurrentLayer):
                continue
            if module.layer_idx in found:
                raise ConfigError(
                    f"{name} keeps state as layer {module.layer_idx}, as another module does",
                    hint="give each module with a state_spec() a layer_idx of its own",
                )
            found[module.layer_idx] = module.state_spec()
        return found

    @property
    def max_positions(self) -> int | None:
        """Longest sequence the configuration allows."""
        return self.model_config.max_positions

    def load_weights(  # type: ignore[override]  # a model takes the whole checkpoint
        self, weights: Mapping[str, torch.Tensor]
    ) -> None:
        """Fill the model from checkpoint tensors in memory, e.g. a transformers state_dict.

        Overriding it replaces the weight map for this model, as in TensorRT-LLM's guide.

        Raises:
            WeightError: If tensors and parameters do not fit, listing all that do not.
        """
        from llmfw.models.weights import load_into_model

        load_into_model(self, weights)

    @classmethod
    def from_hugging_face(
        cls: type[TSelf],
        hf_model_dir: str | Path,
        dtype: str | torch.dtype = "auto",
        mapping: RankMapping | None = None,
        **settings: Any,
    ) -> TSelf:
        """Build and load this model from a Hugging Face directory.

        Args:
            hf_model_dir: Directory with config.json and safetensors files.
            dtype: Type of parameters and activations; "auto" keeps the checkpoint's.
            mapping: Parallel ranks.
            **settings: As `llmfw.models.load_model`.

        Raises:
            ConfigError: If the directory holds another architecture's model.
        """
        from llmfw.models.load import load_model

        loaded = load_model(hf_model_dir, dtype=dtype, mapping=mapping, **settings).model
        if not isinstance(loaded, cls):
            raise ConfigError(
                f"{hf_model_dir} is served by {type(loaded).__name__}, not {cls.__name__}"
            )
        loaded._came_from = (hf_model_dir, {**settings, "dtype": dtype, "mapping": mapping})
        return loaded

    def save_checkpoint(self, output_dir: str | Path) -> None:
        """Write what `from_hugging_face` read as a converted checkpoint, as `llmfw convert` does.

        The weights are read from that directory once more, since kernels may have brought those in
        memory into layouts of their own. Files of all ranks of its mapping are written.

        Args:
            output_dir: The directory to make.

        Raises:
            UsageError: If the model did not come from `from_hugging_face`.
            CheckpointError: If `output_dir` is there already or cannot be written.
        """
        from llmfw.models.convert import convert_checkpoint

        if self._came_from is None:
            raise UsageError(
                f"this {type(self).__name__} was not loaded from a directory",
                hint="load it by from_hugging_face(hf_model_dir, dtype, mapping)",
            )
        directory, given = self._came_from
        known = ("dtype", "mapping", "plugin", "plugin_modules", "extensions")
        settings = {name: value for name, value in given.items() if name in known}
        convert_checkpoint(directory, output_dir, **settings)
