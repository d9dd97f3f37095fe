"""A plugin's hook implementations held against the hookspecs; faults name hook and argument."""

from __future__ import annotations

import inspect
from difflib import get_close_matches
from typing import Any

import pluggy

from llmfw.errors import PluginContractError
from llmfw.plugins import hookspecs

ARGUMENTS = {
    name: tuple(inspect.signature(getattr(hookspecs, name)).parameters)
    for name in hookspecs.HOOK_NAMES
}


class ContractManager(pluggy.PluginManager):
    """A pluggy manager that knows our hooks and reports faults as `PluginContractError`."""

    def __init__(self) -> None:
        super().__init__(hookspecs.PROJECT)
        self._last: object = None
        self.add_hookspecs(hookspecs)

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        """As pluggy's; implementations of core's defaults are `trylast` however they are marked."""
        opts = super().parse_hookimpl_opts(plugin, name)
        if opts is not None and plugin is self._last:
            return {**opts, "trylast": True}
        return opts

    def add(self, plugin: object, label: str) -> None:
        """Register `plugin` under `label`.

        Raises:
            PluginContractError: If it implements what the contract does not know, or knows
                otherwise.
        """
        faults = self._faults(plugin)
        if faults:
            raise contract_error(label, faults)
        try:
            self.register(plugin, name=label)
            self.check_pending()
        except (pluggy.PluginValidationError, ValueError) as exc:
            raise contract_error(label, [str(exc)]) from exc

    def add_defaults(self, defaults: object, label: str) -> None:
        """Register core's defaults, which are asked after everything else."""
        self._last = defaults
        self.add(defaults, label)

    def _faults(self, plugin: object) -> list[str]:
        faults: list[str] = []
        for attribute in dir(plugin):
            opts = self.parse_hookimpl_opts(plugin, attribute)
            if opts is None:
                faults += _unmarked(plugin, attribute)
            else:
                hook = opts.get("specname") or attribute
                faults += _hook_faults(plugin, attribute, hook, opts)
        return faults


def _unmarked(plugin: object, attribute: str) -> list[str]:
    """A function with a hook's name that lost its marker would be skipped in silence."""
    if attribute not in ARGUMENTS:
        return []
    found = inspect.getattr_static(plugin, attribute)
    if not callable(getattr(found, "__func__", found)):
        return []
    return [f"{attribute} is not marked with @hookimpl"]


def _hook_faults(plugin: object, attribute: str, hook: str, opts: dict[str, Any]) -> list[str]:
    known = ARGUMENTS.get(hook)
    if known is None:
        if opts.get("optionalhook"):
            return []
        near = get_close_matches(hook, ARGUMENTS, n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        return [f"{hook} is not a hook; {meant}the hooks are {', '.join(ARGUMENTS)}"]
    function = getattr(plugin, attribute)
    faults = [
        f"{hook}: {fault}"
        for parameter in inspect.signature(function).parameters.values()
        if (fault := _argument_fault(parameter, known)) is not None
    ]
    wrapper = opts.get("wrapper") or opts.get("hookwrapper")
    if wrapper and not inspect.isgeneratorfunction(function):
        faults.append(f"{hook}: a wrapper must yield once, to let the others answer")
    if not wrapper and inspect.isgeneratorfunction(function):
        faults.append(f"{hook}: it yields; mark it with @hookimpl(wrapper=True)")
    return faults


def _argument_fault(parameter: inspect.Parameter, known: tuple[str, ...]) -> str | None:
    name = parameter.name
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        return f"argument {parameter} would stay empty; name what you need of {', '.join(known)}"
    if name == "self":
        return "argument 'self' is unbound; the entry point names a class, let it name an instance"
    if name not in known:
        return f"unknown argument {name!r}; the contract has {', '.join(known)}"
    if parameter.default is not parameter.empty:
        return f"argument {name!r} has a default, so it would never be filled; remove the default"
    if parameter.kind is parameter.KEYWORD_ONLY:
        return f"argument {name!r} is keyword-only, so it would never be filled; remove the '*'"
    return None


def contract_error(label: str, faults: list[str]) -> PluginContractError:
    """The error that lists what is wrong with the hooks of the plugin called `label`."""
    if len(faults) == 1:
        message = f"{label} breaks the plugin contract: {faults[0]}"
    else:
        message = "\n".join([f"{label} breaks the plugin contract:", *(f"  {f}" for f in faults)])
    return PluginContractError(
        message,
        hint="update the plugin, or mend it: docs/plugins/hooks.md has each hook and its arguments",
        plugin=label,
        faults=faults,
    )
