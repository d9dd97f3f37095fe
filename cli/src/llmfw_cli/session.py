"""An `LLM` opened from command-line options, and prompts made ready for it."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmfw_cli.engine_options import EngineOptions
from llmfw_cli.garbage import nothing_collected
from llmfw_cli.options import ServingOptions
from llmfw_cli.output import progress
from llmfw_cli.versions import versions

if TYPE_CHECKING:
    from llmfw import LLM, ModelConfig


@dataclass(frozen=True)
class Session:
    """A loaded model.

    Args:
        llm: The model.
        load_seconds: From the start of loading to a model that is ready.
        name: What reports call it; the source's own name when left out.
    """

    llm: LLM
    load_seconds: float
    name: str | None = None

    @property
    def config(self) -> ModelConfig[Any]:
        """What the model was built from: dtype, device, mapping."""
        return self.llm.loaded.model_config

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        from llmfw.config import text_config

        return int(text_config(self.config.pretrained_config).vocab_size)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the parameters, which decoding one token reads; tied ones count once."""
        return sum(
            each.numel() * each.element_size() for each in self.llm.loaded.model.parameters()
        )

    def about(self) -> dict[str, Any]:
        """Which model and plugin answer, where and with what."""
        return {
            "model": self.name or self.llm.loaded.source.name,
            "plugin": self.llm.loaded.plugin_label,
            "dtype": str(self.config.dtype).removeprefix("torch."),
            "device": str(self.config.device),
            "versions": versions(),
        }


def llm_arguments(
    serving: ServingOptions, engine: EngineOptions, *, with_tokenizer: bool = True
) -> dict[str, Any]:
    """The keywords of `LLM` that the options set."""
    arguments: dict[str, Any] = {**serving.arguments(), **engine.arguments()}
    arguments["attention_backend"] = arguments.pop("attn_backend")
    arguments["skip_tokenizer_init"] = not with_tokenizer
    return arguments


@contextmanager
def open_session(
    model: str,
    serving: ServingOptions,
    engine: EngineOptions,
    *,
    use_generation_config: bool = True,
    with_tokenizer: bool = True,
) -> Iterator[Session]:
    """Load the model, with a progress bar where one is shown, and shut it down at the end."""
    started = time.perf_counter()
    arguments = llm_arguments(serving, engine, with_tokenizer=with_tokenizer)
    arguments["generation_config"] = "auto" if use_generation_config else "none"
    with nothing_collected(), progress("loading") as advance:
        from llmfw import LLM

        llm = LLM(model, **arguments, progress=advance)
    try:
        with llm:
            yield Session(llm, time.perf_counter() - started)
    finally:
        gc.unfreeze()
