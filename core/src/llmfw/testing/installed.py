"""The contract of what `pytest --llmfw-plugin NAME` names: one class an architecture."""

from __future__ import annotations

from llmfw.plugins import PluginEntry
from llmfw.testing import plugin
from llmfw.testing.contract import ModelContract
from llmfw.testing.selection import model_entries


def contract_of(entry: PluginEntry) -> type[ModelContract]:
    """A test class for one entry point."""
    facts = {"architecture": entry.name, "distribution": entry.dist, "__module__": __name__}
    return type(f"Test{entry.name}", (ModelContract,), facts)


for _name in plugin.wanted:
    for _entry in model_entries(_name):
        globals()[f"Test{_entry.name}"] = contract_of(_entry)
