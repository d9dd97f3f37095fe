"""`python -m llmfw_cli.bench.first_token`: one start in a process of its own, timed by phase.

Reads a JSON object from stdin: "model", "arguments" (keywords of `LLM`), "prompt" (token ids) and
"started" (`time.monotonic()` of the process that asks, just before it started this one). Writes one
to stdout: "phases" in seconds, and "total".
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from llmfw_cli.garbage import nothing_collected


def main() -> None:
    """Start, make one token, tell."""
    with nothing_collected():
        from llmfw import LLM, SamplingParams

        asked: dict[str, Any] = json.loads(sys.stdin.read())
        began = asked["started"]
        phases = {"imports": time.monotonic() - began}
        loading = time.monotonic()
        llm = LLM(asked["model"], **asked["arguments"])
    phases |= llm.startup_seconds
    phases["rest"] = time.monotonic() - loading - sum(llm.startup_seconds.values())
    asking = time.monotonic()
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
    output = llm.generate(asked["prompt"], params)
    now = time.monotonic()
    phases["first_token"] = now - asking
    report = llm.loaded.weight_report
    result = {
        "phases": phases,
        "total": now - began,
        "tokens": len(output.outputs[0].token_ids),
        "weight_bytes": report.nbytes if report else None,
        "plugin": llm.loaded.plugin_label,
        "device": str(llm.loaded.model_config.device),
        "dtype": str(llm.loaded.model_config.dtype).removeprefix("torch."),
    }
    llm.shutdown()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
