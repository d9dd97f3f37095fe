"""`python -m llmfw_cli.lm_eval ...`: the command `lm_eval`, with llmfw among its models."""

import sys

from llmfw_cli.errors import report
from llmfw_cli.lm_eval import evaluate

if __name__ == "__main__":
    from llmfw.errors import LlmfwError

    try:
        evaluate(sys.argv[1:])
    except LlmfwError as error:
        sys.exit(report(error))
