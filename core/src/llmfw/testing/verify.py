"""Is a model right? Ours against transformers, or a reference that is named, stage by stage."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import nn

from llmfw.config import text_config
from llmfw.engine.tokenizer import TOKENIZER_FILES
from llmfw.errors import ConfigError, WeightError
from llmfw.llm import LLM
from llmfw.models import prepare_model
from llmfw.testing.checks.logits import FAINT_TOLERANCE
from llmfw.testing.checks.weights import Parts, parts_of, tiny_parts
from llmfw.testing.compare import random_prompts
from llmfw.testing.correspondence import correspond
from llmfw.testing.divergence import TOLERANCE, first_divergence
from llmfw.testing.failure import CheckSkipped
from llmfw.testing.reference import ReferenceFactory, load_reference, transformers_config
from llmfw.testing.subject import Subject
from llmfw.testing.trace import record_reference
from llmfw.testing.verify_report import Stage, VerifyReport
from llmfw.testing.verify_sides import Sides
from llmfw.testing.verify_stages import Failing, Limits, compare_logits, run_ours
from llmfw.weights.sources import require_original

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived",
    "def fibonacci(n):\n    ",
    "1, 2, 3, 4, 5,",
    "Water boils at 100 degrees because",
    "The three laws of thermodynamics say that",
    "Dear Sir or Madam,",
    "In 1969, people first",
)
CONTEXT = 512  # tokens of the engine: prompts are short, and a long cache takes memory


def verify_model(
    model: str,
    *,
    reference: str | ReferenceFactory | None = None,
    num_prompts: int = 4,
    max_tokens: int = 16,
    low_memory: bool = False,
    dtype: str = "float32",
    **settings: Any,
) -> VerifyReport:
    """Verify a real checkpoint.

    Args:
        model: A directory, a GGUF file, a hub id or an alias.
        reference: The model to compare with; transformers' when left out.
        num_prompts: How many prompts.
        max_tokens: Tokens generated for each.
        low_memory: Keep only one of the two models in memory.
        dtype: What both run in; float32 tells the smallest differences.
        **settings: As `llmfw.models.prepare_model` takes them.

    Raises:
        LlmfwError: If one of the two cannot be loaded; a difference is no error.
    """
    begin = time.perf_counter()
    prepared = prepare_model(model, dtype=dtype, **settings)
    require_original(prepared.source, "transformers, with which verify compares,")
    config = prepared.model_config
    name = str(config.dtype).removeprefix("torch.")
    report = VerifyReport(
        {
            "model": prepared.source.name,
            "architecture": prepared.architecture,
            "plugin": prepared.plugin_label,
            "reference": _name_of(reference),
            "dtype": name,
            "device": str(config.device),
        }
    )
    length = min(CONTEXT, config.max_model_len or CONTEXT)
    engine = {**settings, "attention_backend": settings.get("attn_backend", "auto")}
    engine.pop("attn_backend", None)
    folder = prepared.source.model_dir
    engine["skip_tokenizer_init"] = not any((folder / each).is_file() for each in TOKENIZER_FILES)

    def make_ours() -> LLM:
        return LLM(model, dtype=dtype, **{"max_model_len": length, **engine})

    def make_reference() -> nn.Module:
        from llmfw.weights import open_checkpoint

        theirs = transformers_config(prepared.raw_config)
        if theirs is None and reference is None:
            raise ConfigError(
                f"transformers does not know model_type {prepared.raw_config.get('model_type')!r}",
                hint="name a model to compare with: --reference module:factory",
            )
        return load_reference(
            theirs if theirs is not None else config.pretrained_config,
            prepared.source.model_dir,
            open_checkpoint(prepared.source.checkpoint_path),
            reference,
            dtype=config.dtype,
            device=config.device,
        )

    parts = _account(report, lambda: parts_of(prepared))
    if report.passed:
        with Sides(make_ours, make_reference, low_memory=low_memory) as sides:
            prompts = _prompts(sides.ours(), num_prompts, length - max_tokens)
            _compare(report, sides, parts, prompts, max_tokens, Limits(name, tiny=False))
    report.seconds = time.perf_counter() - begin
    return report


def verify_tiny(subject: Subject, *, max_tokens: int = 8, low_memory: bool = False) -> VerifyReport:
    """Verify an architecture on its tiny random checkpoints: with usual weights, then faint ones.

    Faint weights make hidden states so small that eps in the norms decides the result.
    """
    begin = time.perf_counter()
    report = VerifyReport(
        {
            "model": f"tiny random {subject.architecture}",
            "architecture": subject.architecture,
            "plugin": subject.resolved.label,
            "reference": _name_of(subject.reference),
            "dtype": "float32",
            "device": subject.device,
        }
    )
    parts = _account(report, lambda: tiny_parts(subject))
    for weights, relative in (("plain", None), ("faint", FAINT_TOLERANCE)):
        if not report.passed:
            break
        with Sides(
            lambda each=weights: subject.start(each),  # type: ignore[misc]
            lambda each=weights: subject.reference_model(each),  # type: ignore[misc]
            low_memory=low_memory,
        ) as sides:
            limits = Limits("float32", tiny=True, relative=relative)
            count = max_tokens if weights == "plain" else 2
            label = "" if weights == "plain" else f" ({weights} weights)"
            _compare(report, sides, parts, subject.prompts, count, limits, label)
    report.seconds = time.perf_counter() - begin
    return report


def _account(report: VerifyReport, make: Callable[[], Parts]) -> Parts | None:
    """The stage of tensor accounting."""
    try:
        parts = make()
        plan = parts.plan()
    except CheckSkipped as skipped:
        report.stages.append(Stage("tensor accounting", "skipped", str(skipped)))
        return None
    except WeightError as exc:
        report.stages.append(Stage("tensor accounting", "failed", exc.message))
        return None
    detail = (
        f"{len(plan.tensor_names)} tensors, {len(plan.filled)} parameters, "
        f"{len(plan.ties)} tied, {len(plan.ignored)} tensors ignored"
    )
    report.stages.append(Stage("tensor accounting", "passed", detail))
    return parts


def _compare(
    report: VerifyReport,
    sides: Sides,
    parts: Parts | None,
    prompts: list[list[int]],
    max_tokens: int,
    limits: Limits,
    label: str = "",
) -> None:
    ours = run_ours(sides, prompts, max_tokens)
    stages, failing = compare_logits(sides, ours, limits)
    report.stages += [Stage(**{**vars(each), "name": each.name + label}) for each in stages]
    if failing is not None and parts is not None:
        _locate(report, sides, parts, failing, limits.dtype)


def _locate(report: VerifyReport, sides: Sides, parts: Parts, failing: Failing, dtype: str) -> None:
    """Record both models on the steps that differ, and find the first module."""
    ours = sides.record_ours(failing.steps, failing.name)
    ids = [token for step in failing.steps for token in step.get(failing.name, ())]
    theirs, _ = record_reference(sides.reference(), ids)
    correspondence = correspond(parts.model, sides.reference(), parts.checkpoint, parts.weight_map)
    count = len(failing.steps[-1][failing.name])
    rows = slice(len(ids) - count, len(ids))
    report.divergence = first_divergence(
        ours, theirs, correspondence, rows=rows, tolerance=TOLERANCE[dtype]
    )


def _prompts(llm: LLM, count: int, longest: int) -> list[list[int]]:
    """Text in the model's own tokens where it has a tokenizer, random ids for more."""
    texts = PROMPTS[:count]
    if llm.tokenizer is None:
        return random_prompts(count, int(text_config(llm.loaded.model.config).vocab_size), 1, 32)
    found = [llm.tokenizer.encode(text)[:longest] for text in texts]
    vocab = max(max(ids) for ids in found)
    return found + random_prompts(count - len(found), vocab, 1, 32)


def _name_of(reference: str | ReferenceFactory | None) -> str:
    if reference is None:
        from importlib.metadata import version

        return f"transformers {version('transformers')}"
    return reference if isinstance(reference, str) else getattr(reference, "__name__", "reference")
