"""Runs a model that is defined in the file next to this one: python main.py DIRECTORY."""

from __future__ import annotations

import sys

import modeling_mymodel  # noqa: F401 - registers the model

from llmfw import LLM, SamplingParams


def main() -> None:
    with LLM(sys.argv[1], skip_tokenizer_init=True) as llm:
        answer = llm.generate([3, 4, 5], SamplingParams(max_tokens=8, temperature=0))
    print(*answer.outputs[0].token_ids)


if __name__ == "__main__":
    main()
