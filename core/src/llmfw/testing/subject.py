"""What is checked: one architecture, its plugin, and a tiny random checkpoint of it on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmfw.config.reading import read_config_json
from llmfw.llm import LLM
from llmfw.models import LoadedModel, PretrainedModel, load_model
from llmfw.models.build import CoreDefaults
from llmfw.plugins import PluginHost, ResolvedPlugin, resolve_plugin
from llmfw.testing.compare import random_prompts, reference_logits
from llmfw.testing.reference import (
    ReferenceFactory,
    make_reference,
    randomize,
    require_tiny,
    transformers_config,
    write_checkpoint,
)
from llmfw.testing.tiny import declared_tiny_config, shrunk_config, tiny_raw_config

BLOCK_SIZE = 4  # short sequences then span several blocks of the cache
SCALES = {"plain": 1.0, "faint": 0.01}
"""Weights of usual size, and ones so small that eps in the norms decides the result."""


class Subject:
    """One architecture under test; everything it makes is made once and kept.

    Args:
        architecture: As in config.json.
        tiny_config: Fields of a tiny config.json; the plugin's `tiny_configs` or transformers'
            defaults in small when left out.
        reference: Factory of the model to compare with ("module:factory" or a function of the
            configuration); transformers' own when left out.
        distribution: The distribution whose plugin must serve it; whichever does when left out.
        device: Where ours runs.
        settings: More of what `llmfw.models.load_model` takes: kernels, attn_backend, extensions.
            Without `kernels` torch's references run.
    """

    def __init__(
        self,
        architecture: str,
        tiny_config: Mapping[str, Any] | None = None,
        *,
        reference: str | ReferenceFactory | None = None,
        distribution: str | None = None,
        device: str = "cpu",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.architecture = architecture
        self.reference = reference
        self.distribution = distribution
        self.device = device
        self._tiny_config = tiny_config
        self._more_settings = dict(settings or {})
        self._made: tempfile.TemporaryDirectory[str] | None = None
        self._borrowed: Path | None = None
        self._references: dict[str, nn.Module] = {}
        self._models: dict[str, PretrainedModel[Any]] = {}

    def again(self) -> Subject:
        """A subject of the plugin that serves the architecture now, on the same checkpoints."""
        other = Subject(
            self.architecture,
            self._tiny_config,
            reference=self.reference,
            distribution=self.distribution,
            device=self.device,
            settings=self._more_settings,
        )
        other._borrowed, other._references = self.folder, self._references
        return other

    @cached_property
    def resolved(self) -> ResolvedPlugin:
        """The plugin that serves the architecture, imported."""
        extensions = self._more_settings.get("extensions", ())
        return resolve_plugin(self.architecture, prefer=self.distribution, extensions=extensions)

    def host(self) -> PluginHost:
        """A fresh host of its hooks."""
        resolved = self.resolved
        return PluginHost(
            resolved.plugin,
            name=resolved.label,
            defaults=CoreDefaults(),
            extensions=resolved.extensions,
        )

    @cached_property
    def raw_config(self) -> dict[str, Any]:
        """What the tiny config.json is made from."""
        given = self._tiny_config or declared_tiny_config(self.resolved.plugin, self.architecture)
        return tiny_raw_config(self.architecture, given or shrunk_config(self.architecture))

    def reference_config(self) -> Any:
        """The configuration that the reference is made of: transformers' reading, not ours.

        The plugin's own is taken where transformers does not know the model_type.
        """
        config = transformers_config(self.raw_config)
        if config is None:
            config = self.host().hook.llmfw_config(raw=self.raw_config, model_dir=self.folder)
        return config

    @property
    def folder(self) -> Path:
        """Where this subject may write; gone with it."""
        if self._borrowed is not None:
            return self._borrowed
        if self._made is None:
            self._made = tempfile.TemporaryDirectory(prefix="llmfw-check-")
        return Path(self._made.name)

    def reference_model(self, weights: str = "plain") -> nn.Module:
        """The reference with weights of one of `SCALES`."""
        if weights not in self._references:
            if self.reference is None:
                require_tiny(self.reference_config())
            model = make_reference(self.reference_config(), self.reference, dtype=torch.float32)
            randomize(model, scale=SCALES[weights])
            self._references[weights] = model
        return self._references[weights]

    def checkpoint(self, weights: str = "plain") -> Path:
        """The directory with the reference's weights and config.json."""
        folder = self.folder / weights
        if not (folder / "config.json").exists():
            raw = {"architectures": [self.architecture], "dtype": "float32"}
            if not hasattr(self.reference_model(weights), "save_pretrained"):
                raw = {**self.raw_config, **raw}
            write_checkpoint(self.reference_model(weights), raw, folder)
        return folder

    @cached_property
    def written_config(self) -> dict[str, Any]:
        """The tiny checkpoint's config.json."""
        return read_config_json(self.checkpoint())

    @property
    def settings(self) -> dict[str, Any]:
        """How ours is loaded, as `llmfw.models.load_model` takes it."""
        return {
            "device": self.device,
            "plugin": self.distribution,
            "block_size": BLOCK_SIZE,
            "dtype": "float32",
            "kernels": "reference",
            **self._more_settings,
        }

    def load(self, weights: str = "plain", **settings: Any) -> LoadedModel:
        """Ours, loaded anew from the checkpoint through its plugin."""
        return load_model(self.checkpoint(weights), **{**self.settings, **settings})

    def model(self, weights: str = "plain") -> PretrainedModel[Any]:
        """Ours, loaded once."""
        if weights not in self._models:
            self._models[weights] = self.load(weights).model
        return self._models[weights]

    def start(self, weights: str = "plain", **settings: Any) -> LLM:
        """Ours behind an engine without a tokenizer; its caller shuts it down."""
        everything = {"kv_cache_memory": "8MiB", **self.settings, **settings}
        if "attn_backend" in everything:
            everything["attention_backend"] = everything.pop("attn_backend")
        return LLM(self.checkpoint(weights), skip_tokenizer_init=True, **everything)

    @contextmanager
    def engine(self, **settings: Any) -> Iterator[LLM]:
        """Ours behind an engine, for a `with` block."""
        with self.start(**settings) as llm:
            yield llm

    @cached_property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        config = self.reference_config()
        return int(getattr(config, "text_config", config).vocab_size)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest prompt that checks use."""
        config = self.reference_config()
        config = getattr(config, "text_config", config)
        return min(48, int(getattr(config, "max_position_embeddings", None) or 64) * 2 // 3)

    @cached_property
    def prompts(self) -> list[list[int]]:
        """A few prompts of unequal lengths, the longest first."""
        first = random_prompts(1, self.vocab_size, self.longest, self.longest)
        return first + random_prompts(4, self.vocab_size, 1, self.longest * 3 // 4, seed=1)

    def expected(self, ids: list[int], weights: str = "plain") -> torch.Tensor:
        """The reference's logits of one prompt: [tokens, vocab]."""
        return reference_logits(self.reference_model(weights), ids)

    def close(self) -> None:
        """Remove what was written."""
        self._references.clear()
        self._models.clear()
        if self._made is not None:
            self._made.cleanup()
            self._made = None

    def __enter__(self) -> Subject:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
