"""llmfw as a model of the harness `lm-eval`, under the name "llmfw".

lm-eval 0.4 asks no installed package for models, so a process that wants ours calls `register`
first. `llmfw eval` and `python -m llmfw_cli.lm_eval` do that and go on as lm-eval's own command.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

NAME = "llmfw"
_CLASS = "llmfw_cli.lm_eval.model:LlmfwLM"
# What fails in these packages fails for what lm-eval was told, or for want of a task's data.
_OF_THE_USER = ("lm_eval._cli", "lm_eval.config", "datasets")


def register() -> None:
    """Make lm-eval know the model "llmfw"; it is imported when it is asked for.

    Raises:
        UsageError: If lm-eval is not installed.
    """
    try:
        import lm_eval.models  # noqa: F401  # it fills the registry only while that is empty
        from lm_eval.api.registry import model_registry
    except ImportError as exc:
        from llmfw.errors import UsageError

        raise UsageError(
            f"lm-eval cannot be imported: {exc}", hint='pip install "llmfw-cli[eval]"'
        ) from exc
    if NAME not in model_registry:
        model_registry.register(NAME, target=_CLASS)


def evaluate(arguments: Sequence[str]) -> None:
    """Run lm-eval's command with these arguments, our model among its own.

    Raises:
        UsageError: If lm-eval is not installed, knows no such task or does not get its data.
        SystemExit: As lm-eval's command leaves.
    """
    register()
    from lm_eval.__main__ import cli_evaluate

    from llmfw.errors import UsageError

    kept = sys.argv
    sys.argv = ["lm_eval", *arguments]  # the only way in that its command offers
    try:
        cli_evaluate()
    except (ValueError, OSError) as exc:
        if not _raised_in(exc).startswith(_OF_THE_USER):
            raise
        raise UsageError(
            f"lm-eval: {exc}",
            hint="python -m llmfw_cli.lm_eval ls tasks lists the tasks; --include_path adds a "
            "folder of them, and their data comes from the Hugging Face hub",
        ) from exc
    finally:
        sys.argv = kept


def _raised_in(error: BaseException) -> str:
    """The module that raised an error, or "" where nothing tells."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
