"""One pluggy manager for one model: its plugin, the named extensions and core's defaults."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

import pluggy

from llmfw.errors import LlmfwError, PluginContractError, PluginError, UsageError
from llmfw.plugins.contract import ContractManager
from llmfw.plugins.switches import read_flag

T = TypeVar("T")

DEFAULTS = "core's defaults"
_NOTE = "raised in "

_trace = logging.getLogger("llmfw.plugins.trace")


class PluginHost:
    """Asks the hooks of one model.

    The model's plugin is asked first, then the extensions (the last named first), then core's
    defaults; wrappers see what these return, an extension's inside the model plugin's. Defaults are
    registered last and `trylast`, so that even an implementation that another plugin marks
    `trylast` is asked before them.

    Args:
        plugin: The object or module with the model's hook implementations.
        name: What errors call it: distribution and version, or the file of a local plugin.
        defaults: The object with core's implementations.
        extensions: Name and object of each extension, in the order given by the user.

    Raises:
        PluginContractError: If one of them has a hook that the contract does not know, or knows
            otherwise.
        UsageError: If an extension is given twice.
    """

    def __init__(
        self,
        plugin: object,
        *,
        name: str,
        defaults: object,
        extensions: Sequence[tuple[str, object]] = (),
    ) -> None:
        self.name = name
        self.extensions = tuple(label for label, _ in extensions)
        self.calls = 0
        self._manager = ContractManager()
        for label, extension in extensions:
            if self._manager.has_plugin(label) or self._manager.is_registered(extension):
                raise UsageError(f"the extension {label!r} is given twice", hint="name it once")
            self._manager.add(extension, label)
        if plugin is not defaults:
            self._manager.add(plugin, name)
        self._manager.add_defaults(defaults, DEFAULTS)
        self.hook = HookCalls(self)
        if read_flag("LLMFW_TRACE_HOOKS"):
            _trace_to_log(self._manager)

    def call(self, hook: str, **arguments: Any) -> Any:
        """Call a hook by name; an exception of an implementation is attributed to its plugin.

        Raises:
            PluginError: If an implementation raised something that is not an error of ours.
        """
        self.calls += 1
        caller: pluggy.HookCaller = getattr(self._manager.hook, hook)
        try:
            return caller(**arguments)
        except Exception as exc:
            raise_attributed(exc, hook, caller.get_hookimpls())

    def implementers(self, hook: str) -> list[str]:
        """Who implements `hook`, in the order in which they are asked, wrappers first."""
        caller: pluggy.HookCaller = getattr(self._manager.hook, hook)
        return [implementation.plugin_name for implementation in reversed(caller.get_hookimpls())]

    def expect(self, hook: str, result: Any, expected: type[T]) -> T:
        """`result` of `hook`, if it is an `expected`.

        Raises:
            PluginContractError: If not; it names the plugins that may have returned it.
        """
        if isinstance(result, expected):
            return result
        others = [name for name in self.implementers(hook) if name != DEFAULTS]
        raise PluginContractError(
            f"{hook} of {' or '.join(others) or DEFAULTS} returned {type(result).__name__},"
            f" expected {expected.__name__}",
            hint="docs/plugins/hooks.md says what each hook returns",
            hook=hook,
        )


class HookCalls:
    """The hooks of a host as methods: `host.hook.llmfw_config(raw=raw, model_dir=path)`."""

    def __init__(self, host: PluginHost) -> None:
        self._host = host

    def __getattr__(self, hook: str) -> Callable[..., Any]:
        if not hook.startswith("llmfw_"):
            raise AttributeError(hook)

        def call(**arguments: Any) -> Any:
            return self._host.call(hook, **arguments)

        return call


def raise_attributed(exc: Exception, hook: str, implementations: Sequence[pluggy.HookImpl]) -> None:
    """Raise `exc` again, named after the plugin whose implementation of `hook` raised it.

    Our own errors keep their class and get a note; others become a `PluginError` with the original
    as its cause. An exception of core's defaults stays what it is. One that an inner hook call has
    named already is passed on.
    """
    owner = _owner_of(exc.__traceback__, implementations)
    told = any(note.startswith(_NOTE) for note in getattr(exc, "__notes__", ()))
    if owner is None or told:
        raise exc
    if owner == DEFAULTS or isinstance(exc, LlmfwError):
        exc.add_note(f"{_NOTE}{hook} of {owner}")
        raise exc
    place = _place_of(exc.__traceback__, implementations, owner)
    error = PluginError(
        f"{hook} of {owner} raised {type(exc).__name__}: {exc}",
        hint=f"raised at {place}\n"
        "this is a fault of the plugin: update it, or report it to its authors\n"
        "--debug shows the traceback",
        plugin=owner,
        hook=hook,
    )
    error.add_note(f"{_NOTE}{hook} of {owner}")
    raise error from exc


def _owner_of(
    traceback: TracebackType | None, implementations: Sequence[pluggy.HookImpl]
) -> str | None:
    """The plugin whose implementation is the innermost one on the traceback."""
    owners = {_code_of(each.function): each.plugin_name for each in implementations}
    found: str | None = None
    while traceback is not None:
        found = owners.get(traceback.tb_frame.f_code, found)
        traceback = traceback.tb_next
    return found


def _place_of(
    traceback: TracebackType | None, implementations: Sequence[pluggy.HookImpl], owner: str
) -> str:
    """File and line of the innermost frame in the owner's own package."""
    modules = (each.function.__module__ for each in implementations if each.plugin_name == owner)
    packages = {str(module).partition(".")[0] for module in modules}
    place = "a place that is not in its package"
    while traceback is not None:
        frame = traceback.tb_frame
        if str(frame.f_globals.get("__name__")).partition(".")[0] in packages:
            place = f"{frame.f_code.co_filename}, line {traceback.tb_lineno}"
        traceback = traceback.tb_next
    return place


def _code_of(function: Any) -> object:
    return getattr(function, "__code__", function)


def _trace_to_log(manager: ContractManager) -> None:
    """Log every hook call, its result and its time: what LLMFW_TRACE_HOOKS=1 asks for."""
    if not _trace.isEnabledFor(logging.INFO):
        _trace.setLevel(logging.INFO)
    if not _trace.hasHandlers():
        _trace.addHandler(logging.StreamHandler())
    started: list[float] = []

    def before(hook: str, implementations: Sequence[Any], arguments: Mapping[str, Any]) -> None:
        started.append(time.perf_counter())

    def after(
        outcome: pluggy.Result[Any],
        hook: str,
        implementations: Sequence[Any],
        arguments: Mapping[str, Any],
    ) -> None:
        milliseconds = (time.perf_counter() - started.pop()) * 1e3
        told = ", ".join(f"{name}={_brief(value)}" for name, value in arguments.items())
        asked = ", ".join(each.plugin_name for each in reversed(implementations))
        if outcome.exception is None:
            result = _brief(outcome.get_result())
        else:
            result = f"raised {_brief(outcome.exception)}"
        _trace.info(
            "%s%s(%s) -> %s [%s; %.2f ms]",
            "  " * len(started),
            hook,
            told,
            result,
            asked,
            milliseconds,
        )

    manager.add_hookcall_monitoring(before, after)


def _brief(value: object) -> str:
    """Short values as they are, long ones by their type."""
    if value is None or isinstance(value, str | int | float):
        return repr(value)
    if isinstance(value, BaseException):
        return f"{type(value).__name__}: {value}"
    return type(value).__name__
