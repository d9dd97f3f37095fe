"""The options of `llmfw summarize`, under the names of the guide's script where it has them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmfw_cli.groups import OptionGroup

if TYPE_CHECKING:
    from llmfw_cli.summarize.data import Sample

WHAT, DATA, CHECK = "What runs", "Data", "Check"


@dataclass(frozen=True)
class RunOptions(OptionGroup):
    """Which engines run, and over how much."""

    test_llmfw: Annotated[
        bool,
        typer.Option(
            "--test-llmfw",
            help="Run llmfw; without --test-llmfw and --test-hf both run.",
            rich_help_panel=WHAT,
        ),
    ] = False
    test_hf: Annotated[
        bool,
        typer.Option("--test-hf", help="Run transformers.", rich_help_panel=WHAT),
    ] = False
    hf_model_dir: Annotated[
        str | None,
        typer.Option(
            help="What transformers loads; left out, the model itself.",
            rich_help_panel=WHAT,
        ),
    ] = None
    max_ite: Annotated[
        int,
        typer.Option(min=1, help="Most batches.", rich_help_panel=WHAT),
    ] = 20
    batch_size: Annotated[
        int,
        typer.Option(
            min=1,
            help="Articles given at once.",
            rich_help_panel=WHAT,
        ),
    ] = 1
    max_input_length: Annotated[
        int,
        typer.Option(
            min=2,
            help="Most tokens of a prompt; longer articles are cut at their end.",
            rich_help_panel=WHAT,
        ),
    ] = 923
    output_len: Annotated[
        int,
        typer.Option(
            min=1,
            help="Most tokens of a summary.",
            rich_help_panel=WHAT,
        ),
    ] = 100
    num_beams: Annotated[
        int,
        typer.Option(
            min=1,
            help="Above 1, a beam search instead of greedy tokens.",
            rich_help_panel=WHAT,
        ),
    ] = 1
    eval_ppl: Annotated[
        bool,
        typer.Option(
            "--eval-ppl",
            help="Perplexity of each prompt with its reference summary.",
            rich_help_panel=WHAT,
        ),
    ] = False
    output_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where summaries.jsonl and report.json go.",
            rich_help_panel=WHAT,
        ),
    ] = None

    @property
    def runs_llmfw(self) -> bool:
        """Whether our engine runs."""
        return self.test_llmfw or not self.test_hf

    @property
    def runs_hf(self) -> bool:
        """Whether transformers runs."""
        return self.test_hf or not self.test_llmfw


@dataclass(frozen=True)
class DataOptions(OptionGroup):
    """What is summarised, and how the model is asked to."""

    data: Annotated[
        str,
        typer.Option(
            help="builtin, a .jsonl, .csv or .parquet file, or the name of a set of `datasets`.",
            rich_help_panel=DATA,
        ),
    ] = "builtin"
    data_config: Annotated[
        str | None,
        typer.Option(help="Configuration of the set, such as 3.0.0.", rich_help_panel=DATA),
    ] = None
    split: Annotated[str, typer.Option(help="Split of the set.", rich_help_panel=DATA)] = "test"
    article_column: Annotated[
        str | None,
        typer.Option(
            help="Column of the texts; left out, article, document, text or dialogue.",
            rich_help_panel=DATA,
        ),
    ] = None
    summary_column: Annotated[
        str | None,
        typer.Option(
            help="Column of the summaries; left out, highlights, summary or reference.",
            rich_help_panel=DATA,
        ),
    ] = None
    prompt_template: Annotated[
        str | None,
        typer.Option(
            help="The prompt, with {article} in it; left out, the article and TL;DR:.",
            rich_help_panel=DATA,
        ),
    ] = None
    prompts_per_article: Annotated[
        int,
        typer.Option(
            min=1,
            help="Prompts made of each article: it, and ever shorter beginnings down to half. "
            "Differences are averaged article by article before they are tested.",
            rich_help_panel=DATA,
        ),
    ] = 1
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Put the prompt into the chat template.", rich_help_panel=DATA),
    ] = False

    def samples(self, count: int) -> list[Sample]:
        """The first `count` samples."""
        from llmfw_cli.summarize.data import Source, read_samples

        source = Source(
            self.data, self.data_config, self.split, self.article_column, self.summary_column
        )
        return read_samples(source, count)


@dataclass(frozen=True)
class CheckOptions(OptionGroup):
    """When two engines count as different."""

    check_accuracy: Annotated[
        bool,
        typer.Option(
            "--check-accuracy",
            help="Exit with 1 unless llmfw is shown to be as good as transformers.",
            rich_help_panel=CHECK,
        ),
    ] = False
    alpha: Annotated[
        float,
        typer.Option(
            help="The chance to pass engines that differ by a margin.", rich_help_panel=CHECK
        ),
    ] = 0.05
    rouge_margin: Annotated[
        float,
        typer.Option(
            help="Points of 100 that the mean ROUGE may differ by.", rich_help_panel=CHECK
        ),
    ] = 2.0
    ppl_margin: Annotated[
        float,
        typer.Option(help="Part that the perplexity may differ by.", rich_help_panel=CHECK),
    ] = 0.01
