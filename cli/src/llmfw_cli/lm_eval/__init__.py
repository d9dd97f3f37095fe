"""llmfw as a model of the harness `lm-eval`, under the name "llmfw".

lm-eval 0.4 asks no installed package for models, so a process that wants ours calls `register`
first. `llmfw eval` and `python -m llmfw_cli.lm_eval` do that and go on as lm-eval's own command.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

NAME = "llmfw"
_CLASS = "llmfw_cli.lm_eval.model:LlmfwLM"


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
        UsageError: If lm-eval is not installed.
        SystemExit: As lm-eval's command leaves.
    """
    register()
    from lm_eval.__main__ import cli_evaluate

    kept = sys.argv
    sys.argv = ["lm_eval", *arguments]  # the only way in that its command offers
    try:
        cli_evaluate()
    finally:
        sys.argv = kept
