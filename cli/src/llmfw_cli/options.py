"""The options that commands share: what is run, how the engine is set, how tokens are chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from llmfw_cli import logs
from llmfw_cli.completions import complete_distribution, complete_extension, complete_model
from llmfw_cli.groups import OptionGroup

MODEL, ENGINE, SAMPLING, OUTPUT = "Model", "Engine", "Sampling", "Output"

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=OUTPUT)
]

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        envvar="LLMFW_MODEL",
        help="Directory, GGUF file, hub id or alias.",
        autocompletion=complete_model,
        rich_help_panel=MODEL,
    ),
]


@dataclass(frozen=True)
class CommonOptions(OptionGroup):
    """What every command takes."""

    log_level: Annotated[
        logs.Level,
        typer.Option(envvar="LLMFW_LOG_LEVEL", help="What is logged.", rich_help_panel=OUTPUT),
    ] = logs.Level.warning
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet", "-q", envvar="LLMFW_QUIET", help="No progress.", rich_help_panel=OUTPUT
        ),
    ] = False
    debug: Annotated[
        bool,
        typer.Option(
            "--debug", envvar="LLMFW_DEBUG", help="Show tracebacks.", rich_help_panel=OUTPUT
        ),
    ] = False

    def apply(self) -> None:
        """Set up logging and remember whether tracebacks are wanted."""
        logs.set_up(self.log_level, debug=self.debug, quiet=self.quiet)


@dataclass(frozen=True)
class ServingOptions(OptionGroup):
    """What serves the model, in which precision and where."""

    dtype: Annotated[
        str,
        typer.Option(
            envvar="LLMFW_DTYPE",
            help="auto, float32, bfloat16 or float16.",
            rich_help_panel=MODEL,
        ),
    ] = "auto"
    device: Annotated[
        str,
        typer.Option(
            envvar="LLMFW_DEVICE", help="auto, cpu, cuda or cuda:N.", rich_help_panel=MODEL
        ),
    ] = "auto"
    plugin: Annotated[
        str | None,
        typer.Option(
            help="Distribution that must serve the model; LLMFW_PREFER only prefers one.",
            autocompletion=complete_distribution,
            rich_help_panel=MODEL,
        ),
    ] = None
    plugin_module: Annotated[
        list[str] | None,
        typer.Option(
            help="File or module that registers a model; may be given several times. "
            "LLMFW_PLUGIN_MODULES names more.",
            rich_help_panel=MODEL,
        ),
    ] = None
    extension: Annotated[
        list[str] | None,
        typer.Option(
            help="Installed extension to switch on; may be given several times. "
            "LLMFW_EXTENSIONS names more.",
            autocompletion=complete_extension,
            rich_help_panel=MODEL,
        ),
    ] = None
    kernels: Annotated[
        str,
        typer.Option(
            envvar="LLMFW_KERNELS",
            help="auto, reference, or packs and kernels to take or (-name) to leave out.",
            rich_help_panel=MODEL,
        ),
    ] = "auto"
    attn_backend: Annotated[
        str,
        typer.Option(
            envvar="LLMFW_ATTN_BACKEND", help="auto or a backend's name.", rich_help_panel=MODEL
        ),
    ] = "auto"

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `LLM` and of `prepare_model` that these options set."""
        from llmfw.plugins.switches import read_list

        return {
            "dtype": self.dtype,
            "device": self.device,
            "plugin": self.plugin,
            "plugin_modules": tuple(self.plugin_module or ()),
            "extensions": (*read_list("LLMFW_EXTENSIONS"), *(self.extension or ())),
            "kernels": self.kernels,
            "attn_backend": self.attn_backend,
        }


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
            help="Directory with another tokenizer than the model's.",
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
        memory = self.kv_cache_memory
        if memory is not None:
            values["kv_cache_memory"] = _memory(memory)
        return {name: value for name, value in values.items() if value is not None}


def _memory(text: str) -> int | float | str:
    """A whole number is bytes, a number with a point a fraction; the engine reads the rest."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


@dataclass(frozen=True)
class SamplingOptions(OptionGroup):
    """How tokens are chosen and when they end; names and ranges are those of `SamplingParams`."""

    max_tokens: Annotated[
        int,
        typer.Option(
            envvar="LLMFW_MAX_TOKENS", help="Most tokens to make.", rich_help_panel=SAMPLING
        ),
    ] = 256
    temperature: Annotated[
        float | None,
        typer.Option(
            envvar="LLMFW_TEMPERATURE",
            help="0 takes the most probable token; left out, the model's own.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option(
            envvar="LLMFW_TOP_K", help="Keep the K most probable.", rich_help_panel=SAMPLING
        ),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(
            envvar="LLMFW_TOP_P",
            help="Keep the most probable up to this sum.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(
            envvar="LLMFW_MIN_P",
            help="Drop what is less probable than this times the best.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            envvar="LLMFW_REPETITION_PENALTY",
            help="Above 1 discourages tokens that were seen.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    presence_penalty: Annotated[
        float,
        typer.Option(
            envvar="LLMFW_PRESENCE_PENALTY",
            help="Subtracted once from tokens of the output.",
            rich_help_panel=SAMPLING,
        ),
    ] = 0.0
    frequency_penalty: Annotated[
        float,
        typer.Option(
            envvar="LLMFW_FREQUENCY_PENALTY",
            help="Subtracted for each time a token came.",
            rich_help_panel=SAMPLING,
        ),
    ] = 0.0
    seed: Annotated[
        int | None,
        typer.Option(
            envvar="LLMFW_SEED",
            help="Makes sampling reproducible, in any batch.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    min_tokens: Annotated[
        int,
        typer.Option(
            envvar="LLMFW_MIN_TOKENS", help="No end before so many.", rich_help_panel=SAMPLING
        ),
    ] = 0
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help="Text that ends the output; may be given several times.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    stop_token_id: Annotated[
        list[int] | None,
        typer.Option(
            help="Token that ends the output; may be given several times.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    bad_word: Annotated[
        list[str] | None,
        typer.Option(
            help="Word that never comes out; may be given several times.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    ignore_eos: Annotated[
        bool,
        typer.Option("--ignore-eos", help="Go on after an end token.", rich_help_panel=SAMPLING),
    ] = False
    logprobs: Annotated[
        int | None,
        typer.Option(
            help="Log probabilities of so many best tokens, in --json.", rich_help_panel=SAMPLING
        ),
    ] = None
    include_stop: Annotated[
        bool,
        typer.Option(
            "--include-stop", help="Keep the stop text in the output.", rich_help_panel=SAMPLING
        ),
    ] = False
    skip_special_tokens: Annotated[
        bool,
        typer.Option(
            "--skip-special-tokens/--keep-special-tokens",
            help="Leave special tokens out of the text.",
            rich_help_panel=SAMPLING,
        ),
    ] = True
    use_generation_config: Annotated[
        bool,
        typer.Option(
            "--generation-config/--no-generation-config",
            envvar="LLMFW_GENERATION_CONFIG",
            help="Take unset values from the checkpoint's generation_config.json.",
            rich_help_panel=SAMPLING,
        ),
    ] = True

    def params(self, **more: Any) -> Any:
        """The `SamplingParams` that these options ask for.

        Raises:
            UsageError: If a value is out of range.
        """
        from llmfw import SamplingParams

        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
            min_tokens=self.min_tokens,
            stop=self.stop,
            stop_token_ids=self.stop_token_id,
            bad_words=self.bad_word,
            ignore_eos=self.ignore_eos,
            logprobs=self.logprobs,
            include_stop_str_in_output=self.include_stop,
            skip_special_tokens=self.skip_special_tokens,
            **more,
        )
