"""How tokens are chosen and when they end, as options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmfw_cli.groups import OptionGroup

if TYPE_CHECKING:
    from llmfw import SamplingParams

SAMPLING = "Sampling"


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
    num_beams: Annotated[
        int,
        typer.Option(
            envvar="LLMFW_NUM_BEAMS",
            min=1,
            help="Search with so many beams instead of drawing.",
            rich_help_panel=SAMPLING,
        ),
    ] = 1
    length_penalty: Annotated[
        float,
        typer.Option(
            help="Beams: scores are divided by length to this power; above 0 favours long ones.",
            rich_help_panel=SAMPLING,
        ),
    ] = 1.0
    early_stopping: Annotated[
        str,
        typer.Option(
            metavar="no|yes|never",
            help="Beams: no stops when none can become better at its length, yes once as many as "
            "beams are finished, never when none can at any length. 0, 1 and 2 are the same.",
            rich_help_panel=SAMPLING,
        ),
    ] = "no"
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
    prompt_logprobs: Annotated[
        int | None,
        typer.Option(
            help="The same for the tokens of the prompt.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID=BIAS",
            help="Added to the logits of a token; may be given several times.",
            rich_help_panel=SAMPLING,
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

    def params(self, **more: Any) -> SamplingParams:
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
            num_beams=self.num_beams,
            length_penalty=self.length_penalty,
            early_stopping=_early_stopping(self.early_stopping),
            stop=self.stop,
            stop_token_ids=self.stop_token_id,
            bad_words=self.bad_word,
            ignore_eos=self.ignore_eos,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            logit_bias=_biases(self.logit_bias or ()),
            include_stop_str_in_output=self.include_stop,
            skip_special_tokens=self.skip_special_tokens,
            **more,
        )


def _early_stopping(word: str) -> bool | str:
    """What `SamplingParams` has for the option's words; it refuses all others."""
    words: dict[str, bool | str] = {"no": False, "0": False, "yes": True, "1": True, "2": "never"}
    return words.get(word, word)


def _biases(texts: Sequence[str]) -> dict[int, float]:
    """Token id -> bias, from "id=bias"."""
    biases: dict[int, float] = {}
    for text in texts:
        token, _, bias = text.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError as exc:
            from llmfw.errors import UsageError

            raise UsageError(
                f"--logit-bias {text!r} is not a token id and a number",
                hint="for example --logit-bias 42=-1.5",
            ) from exc
    return biases
