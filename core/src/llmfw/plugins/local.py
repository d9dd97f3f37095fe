"""Plugins that are not installed: classes of the running script, files of `--plugin-module`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from llmfw.errors import (
    LlmfwError,
    PluginConflictError,
    PluginContractError,
    PluginLoadError,
    UsageError,
)
from llmfw.plugins.switches import read_list

logger = logging.getLogger("llmfw.plugins")

VARIABLE = "LLMFW_PLUGIN_MODULES"
_FAULTS = (Exception, SystemExit)  # Ctrl-C is not the module's fault


@dataclass(frozen=True)
class LocalPlugin:
    """A plugin registered by code that is not an installed plugin.

    Args:
        architecture: What it serves.
        plugin: The object with hook implementations.
        origin: The file, or the module's name where there is no file (an interactive session).
        path: The file, for workers that must load the same; None without one.
        sha256: Digest of that file when it was registered.
    """

    architecture: str
    plugin: object
    origin: str
    path: Path | None = None
    sha256: str | None = None

    @property
    def label(self) -> str:
        """What errors and logs call it."""
        return f"local plugin {self.origin}"

    @property
    def is_main(self) -> bool:
        """Whether it belongs to the script that is running, which other processes cannot import."""
        if self.path is None:
            return True
        main = getattr(sys.modules.get("__main__"), "__file__", None)
        return main is not None and Path(main).resolve() == self.path


_registry: dict[str, LocalPlugin] = {}
_loaded_files: dict[Path, tuple[str, str]] = {}  # file -> (digest, module name)


def register_local(architecture: str, plugin: object, origin: str) -> LocalPlugin:
    """Let `plugin` serve `architecture` in this process, before any installed plugin.

    Registering again from the same origin replaces the former one (a cell run twice, a file loaded
    again).

    Args:
        architecture: As in `config.json`.
        plugin: An object or module with hook implementations.
        origin: The file that defines it, or another name for it.

    Raises:
        PluginConflictError: If another origin has registered the architecture.
    """
    former = _registry.get(architecture)
    if former is not None and former.origin != origin:
        raise PluginConflictError(
            f"the architecture {architecture!r} is registered twice: "
            f"in {former.origin} and in {origin}",
            hint="load only one of the two, or register one under another name",
            architecture=architecture,
            owners=[former.origin, origin],
        )
    path = Path(origin).resolve() if Path(origin).is_file() else None
    local = LocalPlugin(architecture, plugin, origin, path, _digest(path) if path else None)
    _registry[architecture] = local
    return local


def unregister_local(architecture: str) -> None:
    """Forget the local plugin of `architecture`, if there is one."""
    _registry.pop(architecture, None)


def find_local(architecture: str) -> LocalPlugin | None:
    """The local plugin that serves `architecture`, or None."""
    return _registry.get(architecture)


def local_plugins() -> tuple[LocalPlugin, ...]:
    """All local plugins, by architecture."""
    return tuple(_registry[name] for name in sorted(_registry))


def load_plugin_module(path_or_module: str | Path) -> ModuleType:
    """Import a file (`my_model.py`) or a module (`package.module`) that registers plugins.

    It registers with `@register_auto_model("Architecture")` on a class, or with
    `llmfw.plugins.register_local(architecture, plugin, __file__)`. A file is run once as long as it
    does not change and its plugins are registered.

    Raises:
        UsageError: If there is no such file or module.
        PluginLoadError: If importing it fails; the original exception is chained.
        PluginContractError: If it registers nothing.
    """
    text = str(path_or_module)
    is_file = text.endswith(".py") or "/" in text or "\\" in text
    module = _load_file(Path(text).expanduser()) if is_file else _load_module(text)
    origins = {module.__name__, str(getattr(module, "__file__", None))}
    inside = f"{module.__name__}."
    for local in _registry.values():
        name = getattr(local.plugin, "__module__", None) or ""
        if local.origin in origins or str(local.path) in origins or name.startswith(inside):
            return module
    raise PluginContractError(
        f"{text} registers no plugin",
        hint='put @register_auto_model("YourArchitecture") above its model class,\n'
        "or call llmfw.plugins.register_local(architecture, plugin, __file__) in it",
    )


def load_plugin_modules(modules: Iterable[str | Path] = ()) -> list[ModuleType]:
    """Load those that LLMFW_PLUGIN_MODULES names, then `modules`."""
    return [load_plugin_module(module) for module in (*read_list(VARIABLE), *modules)]


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(
            f"no such plugin file: {path}",
            hint="give the path of a .py file, or a module's name with dots: package.module",
        )
    path = path.resolve()
    digest = _digest(path)
    known, name = _loaded_files.get(path, ("", ""))
    registered = any(local.path == path for local in _registry.values())
    if known == digest and registered and name in sys.modules:
        return sys.modules[name]
    name = f"llmfw_local_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is not a Python file", hint="a plugin file's name ends with .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException as exc:
        del sys.modules[name]
        if isinstance(exc, LlmfwError) or not isinstance(exc, _FAULTS):
            raise
        raise _load_error(str(path), exc, cure=f"python {path}") from exc
    _loaded_files[path] = (digest, name)
    logger.info("loaded plugin module %s (sha256 %s)", path, digest[:12])
    return module


def _load_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except LlmfwError:
        raise
    except _FAULTS as exc:
        missing = exc.name if isinstance(exc, ModuleNotFoundError) else None
        if missing and f"{name}.".startswith(f"{missing}."):
            raise UsageError(
                f"no such plugin module: {name}",
                hint="it must be importable: install it or put its folder on PYTHONPATH,\n"
                "or give the path of a .py file",
            ) from exc
        raise _load_error(name, exc, cure=f"python -c 'import {name}'") from exc


def _load_error(what: str, exc: BaseException, cure: str) -> PluginLoadError:
    return PluginLoadError(
        f"the plugin module {what} cannot be loaded: "
        f"{type(exc).__name__}: {exc}{_line_of(exc, what)}",
        hint=f"mend it, and try it alone: {cure}",
        path=what,
    )


def _line_of(exc: BaseException, path: str) -> str:
    """Where in the file it was raised."""
    line: int | None = None
    traceback = exc.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == path:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return f" (line {line})" if line else ""


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
