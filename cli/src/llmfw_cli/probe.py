"""Import one plugin and check its hooks: what `llmfw plugins doctor` runs in a process of its own.

Called with the entry's fields as a JSON list; prints one JSON object as its last line.
"""

from __future__ import annotations

import json
import sys
import time

from llmfw.errors import LlmfwError
from llmfw.plugins import PluginEntry
from llmfw.plugins.contract import ContractManager


def probe(group: str, name: str, value: str, dist: str, version: str) -> dict[str, str]:
    """Whether the entry is sound, and how long its import takes."""
    entry = PluginEntry(group, name, value, dist, version)
    started = time.perf_counter()
    try:
        loaded = entry.load()
        if entry.group != "llmfw.aliases":
            ContractManager().add(loaded, entry.label)
    except LlmfwError as error:
        return {"state": error.message, "exit_code": str(error.exit_code)}
    return {"state": "ok", "seconds": f"{time.perf_counter() - started:.2f}"}


if __name__ == "__main__":
    found = probe(*json.loads(sys.argv[1]))
    print(json.dumps(found))
