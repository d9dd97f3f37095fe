"""The engine's settings as options: lengths, memory, batching, scheduling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from llmfw_cli.groups import OptionGroup

ENGINE = "Engine"


@dataclass(frozen=True)
class EngineOptions(OptionGroup):
    """The engine's settings; those left out are settled by the model and the device."""

    max_model_len: Annotated[
        int | None,
        typer.Option(
            envvar="LLMFW_MAX_MODEL_LEN",
            help="Most tokens of a sequence.",
            rich_help_panel=ENGINE,
        ),
    ] = None
    block_size: Annotated[
        int,
        typer.Option(
            envvar="LLMFW_BLOCK_SIZE", help="Tokens of a cache block.", rich_help_panel=ENGINE
        ),
    ] = 16
    kv_cache_memory: Annotated[
        str | None,
        typer.Option(
            envvar="LLMFW_KV_CACHE_MEMORY",
            help='Memory of the cache: bytes, "2GiB", or a fraction of what is free.',
            rich_help_panel=ENGINE,
        ),
    ] = None
    max_num_seqs: Annotated[
        int | None,
        typer.Option(
            envvar="LLMFW_MAX_NUM_SEQS",
            help="Most sequences in flight.",
            rich_help_panel=ENGINE,
        ),
    ] = None
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option(
            envvar="LLMFW_MAX_NUM_BATCHED_TOKENS",
            help="Most tokens of a step.",
            rich_help_panel=ENGINE,
        ),
    ] = None
    enable_prefix_caching: Annotated[
        bool,
        typer.Option(
            "--prefix-caching/--no-prefix-caching",
            envvar="LLMFW_PREFIX_CACHING",
            help="Share the cache of equal prompt beginnings.",
            rich_help_panel=ENGINE,
        ),
    ] = True
    enable_chunked_prefill: Annotated[
        bool,
        typer.Option(
            "--chunked-prefill/--no-chunked-prefill",
            envvar="LLMFW_CHUNKED_PREFILL",
            help="Compute long prompts over several steps.",
            rich_help_panel=ENGINE,
        ),
    ] = True

    tokenizer: Annotated[
        str | None,
        typer.Option(
            envvar="LLMFW_TOKENIZER",
            help="Another tokenizer than the model's: its directory, or a model.",
            rich_help_panel=ENGINE,
        ),
    ] = None
    cuda_graphs: Annotated[
        bool,
        typer.Option(
            "--cuda-graphs/--no-cuda-graphs",
            envvar="LLMFW_CUDA_GRAPHS",
            help="Capture decode steps on a GPU and replay them.",
            rich_help_panel=ENGINE,
        ),
    ] = True
    overlap_scheduling: Annotated[
        bool | None,
        typer.Option(
            "--overlap/--no-overlap",
            envvar="LLMFW_OVERLAP",
            help="Prepare a step while the one before it runs; left out, on a GPU.",
            rich_help_panel=ENGINE,
        ),
    ] = None
    engine_seed: Annotated[
        int,
        typer.Option(
            envvar="LLMFW_ENGINE_SEED",
            help="Where requests without --seed get theirs from, and dummy weights.",
            rich_help_panel=ENGINE,
        ),
    ] = 0
    load_format: Annotated[
        str,
        typer.Option(
            envvar="LLMFW_LOAD_FORMAT",
            help="auto, or dummy for random weights.",
            rich_help_panel=ENGINE,
        ),
    ] = "auto"

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `LLM` that these options set."""
        values = dict(vars(self))
        values["seed"] = values.pop("engine_seed")
        values["kv_cache_memory"] = memory_of(self.kv_cache_memory)
        return {name: value for name, value in values.items() if value is not None}


def memory_of(text: str | None) -> int | float | str | None:
    """A whole number is bytes, a number with a point a fraction; the engine reads the rest."""
    if text is None:
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
