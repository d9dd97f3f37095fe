"""Who serves a model, and what it does: entry points give identity, pluggy hooks give behaviour.

| module | holds |
|---|---|
| `hookspecs` | the contract: five hooks, documented |
| `catalog` | what is installed, read from metadata alone |
| `choose` | which installed plugin serves an architecture, the errors when none or two do |
| `compat` | a distribution's requirements checked before its code is imported |
| `contract` | hook names and signatures held against the hookspecs |
| `host` | one pluggy manager for one model |
| `local` | plugins of the running script and of `--plugin-module` |
| `resolve` | all of the above in order: from an architecture to a loaded plugin |
| `reference` | what a worker process needs to load the very same plugin |
| `kernel_packs` | kernel packs; a broken one is left out and named |
| `foreign` | the unrelated PyPI distribution that is called `llmfw` |
| `switches` | the environment variables, validated |

Nothing here imports torch, and nothing imports a plugin before its architecture is asked for.
"""

from __future__ import annotations

from llmfw.plugins.catalog import Catalog, PluginEntry
from llmfw.plugins.choose import unknown_architecture
from llmfw.plugins.hookspecs import hookimpl, hookspec
from llmfw.plugins.host import PluginHost
from llmfw.plugins.kernel_packs import PackProblem, collect_kernels, load_kernel_packs
from llmfw.plugins.local import (
    LocalPlugin,
    find_local,
    load_plugin_module,
    register_local,
    unregister_local,
)
from llmfw.plugins.reference import PluginReference, load_reference, reference_to
from llmfw.plugins.resolve import ResolvedPlugin, resolve_plugin

__all__ = [
    "hookimpl",
    "hookspec",
    "Catalog",
    "PluginEntry",
    "PluginHost",
    "ResolvedPlugin",
    "resolve_plugin",
    "unknown_architecture",
    "PluginReference",
    "reference_to",
    "load_reference",
    "LocalPlugin",
    "register_local",
    "unregister_local",
    "find_local",
    "load_plugin_module",
    "PackProblem",
    "load_kernel_packs",
    "collect_kernels",
]
