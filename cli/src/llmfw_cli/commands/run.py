"""`llmfw run`: complete prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmfw_cli.engine_options import EngineOptions
from llmfw_cli.groups import takes_groups
from llmfw_cli.guide import DEFAULT_PROMPT
from llmfw_cli.inputs import read_prompts
from llmfw_cli.options import CommonOptions, JsonOption, ModelOption, ServingOptions
from llmfw_cli.output import note, write_json
from llmfw_cli.output_files import check_output_files, write_output_files
from llmfw_cli.printing import layout_for, print_stream, print_texts, raise_first
from llmfw_cli.profiling import profile, profile_line
from llmfw_cli.prompt_files import FilePrompt, PaddedIds, usage_error
from llmfw_cli.run_options import RunOptions
from llmfw_cli.sampling_options import SamplingOptions
from llmfw_cli.session import Session, open_session

if TYPE_CHECKING:
    from llmfw import RequestOutput, SamplingParams

PROMPT = "Prompt"


@takes_groups
def run(
    common: CommonOptions,
    model: ModelOption,
    serving: ServingOptions,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="Prompts; - is standard input."),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            "-p",
            help="A prompt; - is standard input. May be given several times.",
            rich_help_panel=PROMPT,
        ),
    ] = None,
    prompt_file: Annotated[
        list[Path] | None,
        typer.Option(
            help="A file of prompts: .jsonl; .csv or .npy with token ids; any other is one text. "
            "May be given several times.",
            rich_help_panel=PROMPT,
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Put each prompt into the chat template.", rich_help_panel=PROMPT
        ),
    ] = False,
    system: Annotated[
        str | None,
        typer.Option(help="System message, with --chat.", rich_help_panel=PROMPT),
    ] = None,
    n: Annotated[
        int | None,
        typer.Option(
            "--n",
            "-n",
            help="Completions for each prompt, or best beams; 1, or with --labels all beams, "
            "when left out.",
            rich_help_panel=PROMPT,
        ),
    ] = None,
    json: JsonOption = False,
    *,
    options: RunOptions,
    sampling: SamplingOptions,
    engine: EngineOptions,
) -> None:
    """Complete prompts.

    Without --prompt and --prompt-file, standard input is the prompt. The text streams to standard
    output; with --json one object is printed at the end, which has a list `outputs` where there are
    several. The options of TensorRT-LLM's run.py are understood, too.
    """
    default = DEFAULT_PROMPT if options.labels else None
    given = read_prompts([*(prompts or ()), *(prompt or ())], prompt_file or (), default)
    if system is not None and not chat:
        raise usage_error("--system needs the chat template", hint="add --chat")
    check_output_files(options)
    if n is None:
        n = sampling.num_beams if options.labels else 1
    params = sampling.params(n=n, **_logits(options, sampling.num_beams))
    use = sampling.use_generation_config
    engine = _engine_for(options, engine)
    with open_session(model, serving, engine, use_generation_config=use) as session:
        inputs = [_ready(session, each, chat, system) for each in given]
        with _recorded(session, options):
            requests = _answer(session, inputs, params, options, as_json=json)
        write_output_files(requests, options)
        measured = None
        if options.run_profiling:
            measured = profile(session, inputs, params, options.profiling_repeats)
        if json:
            _write_object(session, requests, measured)
        elif measured is not None:
            note(profile_line(measured))
        raise_first([request.error for request in requests if request.error is not None])


def _logits(options: RunOptions, num_beams: int) -> dict[str, bool]:
    """The logits that a file is wanted of; beams have none of their own."""
    wanted = options.output_logits_npy is not None
    return {
        "return_context_logits": wanted,
        "return_generation_logits": wanted and num_beams == 1,
    }


def _engine_for(options: RunOptions, engine: EngineOptions) -> EngineOptions:
    """Settings without what would hide modules, or make repeats cheaper than the first time."""
    if options.debug_mode:
        engine = dataclasses.replace(engine, cuda_graphs=False)
    if options.run_profiling:
        engine = dataclasses.replace(engine, enable_prefix_caching=False)
    return engine


def _ready(session: Session, prompt: FilePrompt, chat: bool, system: str | None) -> str | list[int]:
    if isinstance(prompt, list):
        if chat:
            raise usage_error(
                "--chat needs texts, but a file has token ids", hint="leave --chat out"
            )
        return _stripped(session, prompt) if isinstance(prompt, PaddedIds) else prompt
    if not chat:
        return prompt
    messages = [{"role": "system", "content": system}] if system is not None else []
    return session.llm.chat_token_ids([*messages, {"role": "user", "content": prompt}])


def _stripped(session: Session, ids: list[int]) -> list[int]:
    """The ids without padding tokens at their ends."""
    tokenizer = session.llm.tokenizer
    pad = tokenizer and tokenizer.token_id(tokenizer.special_tokens.get("pad_token"))
    kept = [place for place, token in enumerate(ids) if token != pad]
    return ids[kept[0] : kept[-1] + 1] if kept else []


@contextmanager
def _recorded(session: Session, options: RunOptions) -> Iterator[None]:
    """With --debug-mode, keep what modules give meanwhile and write it."""
    if not options.debug_mode:
        yield
        return
    from llmfw.models.recording import ModuleRecorder

    with ModuleRecorder(session.llm.loaded.model, options.debug_modules or ("*",)) as recorder:
        yield
    recorder.save(options.debug_file)
    note(f"{len(recorder.arrays)} arrays in {options.debug_file}{_silent(recorder.silent)}")


def _silent(names: Sequence[str]) -> str:
    """The end of the note: modules that gave nothing, the first few by name."""
    if not names:
        return ""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"; nothing came of {', '.join(names[:4])}{more}"


def _answer(
    session: Session,
    inputs: list[Any],
    params: SamplingParams,
    options: RunOptions,
    *,
    as_json: bool,
) -> list[RequestOutput]:
    """Answer the prompts and, unless they become an object, print the texts."""
    layout = layout_for(labels=options.labels, several=len(inputs) > 1 or params.n > 1)
    alone = len(inputs) == 1 and not options.labels
    if not as_json and params.n == 1 and (alone or options.streaming):
        return print_stream(session, inputs, params, layout)
    requests: list[RequestOutput] = session.llm.generate(inputs, params)
    if not as_json:
        print_texts(session, requests, layout)
    return requests


def _write_object(
    session: Session, requests: Sequence[RequestOutput], measured: dict[str, Any] | None
) -> None:
    from llmfw_cli.results import all_results, one_result

    single = len(requests) == 1 and len(requests[0].outputs) == 1 and requests[0].error is None
    value = one_result(requests[0], session) if single else all_results(list(requests), session)
    if measured is not None:
        value["profiling"] = measured
    write_json(value)
