"""Which model a benchmark runs: one that has weights, or the shape of a config.json alone."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from llmfw_cli.completions import complete_model
from llmfw_cli.engine_options import EngineOptions
from llmfw_cli.groups import OptionGroup
from llmfw_cli.options import MODEL, ServingOptions
from llmfw_cli.session import Session, open_session


@dataclass(frozen=True)
class SubjectOptions(OptionGroup):
    """The model that is measured."""

    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            envvar="LLMFW_MODEL",
            help="Directory, GGUF file, hub id or alias.",
            autocompletion=complete_model,
            rich_help_panel=MODEL,
        ),
    ] = None
    dummy_weights: Annotated[
        Path | None,
        typer.Option(
            metavar="CONFIG",
            help="Instead of --model: a config.json (or its directory), whose shape gets random "
            "weights on the device, without files.",
            rich_help_panel=MODEL,
        ),
    ] = None

    @contextmanager
    def resolved(self, engine: EngineOptions) -> Iterator[tuple[str, EngineOptions, str]]:
        """The model as `LLM` takes it, the engine's settings for it, and its name for reports.

        Raises:
            UsageError: If not exactly one of the options is given.
        """
        from llmfw.errors import UsageError
        from llmfw_cli.bench.checkpoint import config_file

        if (self.model is None) == (self.dummy_weights is None):
            raise UsageError(
                "give one of --model (or LLMFW_MODEL) and --dummy-weights",
                hint="--dummy-weights needs a config.json alone",
            )
        if self.model is not None:
            yield self.model, engine, self.model
            return
        assert self.dummy_weights is not None
        source = config_file(self.dummy_weights)
        with tempfile.TemporaryDirectory(prefix="llmfw-shape-") as folder:
            shutil.copy(source, Path(folder) / "config.json")
            yield folder, replace(engine, load_format="dummy"), f"shape of {self.dummy_weights}"

    @contextmanager
    def opened(self, serving: ServingOptions, engine: EngineOptions) -> Iterator[Session]:
        """The model, loaded, without a tokenizer: prompts are token ids."""
        with self.resolved(engine) as (model, settings, name):
            with open_session(
                model, serving, settings, with_tokenizer=settings.tokenizer is not None
            ) as session:
                yield replace(session, name=name)
