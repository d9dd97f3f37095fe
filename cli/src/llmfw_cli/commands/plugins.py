"""`llmfw plugins`: what is installed, and whether it is sound."""

from __future__ import annotations

import json as json_module
import subprocess
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmfw_cli.completions import complete_distribution
from llmfw_cli.groups import takes_groups
from llmfw_cli.options import CommonOptions, JsonOption
from llmfw_cli.output import write, write_facts, write_json, write_table

if TYPE_CHECKING:
    from llmfw.plugins import Catalog, PluginEntry

PROBE_SECONDS = 120.0

app = typer.Typer(help="Show and check the installed plugins.", no_args_is_help=True)


@app.command("list")
@takes_groups
def list_plugins(common: CommonOptions, json: JsonOption = False) -> None:
    """List the installed plugins, from metadata alone: none is imported."""
    from llmfw.plugins import Catalog

    catalog = Catalog.scan()
    rows = [_row(entry, catalog) for entry in catalog.entries]
    if json:
        write_json({"plugins": rows, "problems": list(catalog.problems)})
        return
    heads = ("group", "name", "distribution", "version", "entry point", "state")
    keys = ("group", "name", "dist", "version", "value", "state")
    write_table(heads, [[row[key] for key in keys] for row in rows])
    _tell_problems(catalog)


@app.command("info")
@takes_groups
def info(
    common: CommonOptions,
    distribution: Annotated[
        str,
        typer.Argument(help="Distribution's name.", autocompletion=complete_distribution),
    ],
    json: JsonOption = False,
) -> None:
    """Show one plugin, from metadata alone: what it serves and requires, and what is not met."""
    from importlib import metadata

    from llmfw.plugins import Catalog
    from llmfw.plugins.compat import misfits

    catalog = Catalog.scan()
    entries = _entries_of(catalog, distribution)
    first = entries[0]
    facts = {
        "distribution": first.dist,
        "version": first.version,
        "summary": metadata.metadata(first.dist)["Summary"],
        "location": str(metadata.distribution(first.dist).locate_file("")),
        "provides": [f"{entry.group}: {entry.name} = {entry.value}" for entry in entries],
        "requires": list(first.requires),
        "unmet": [misfit.reason for misfit in misfits(first.requires)],
        "state": _state(first, catalog),
    }
    if json:
        write_json(facts)
    else:
        write_facts({name: _lines(value) for name, value in facts.items()})


@app.command("doctor")
@takes_groups
def doctor(
    common: CommonOptions,
    json: JsonOption = False,
) -> None:
    """Check each plugin: its requirements, its import, its hooks.

    Each is imported in a process of its own, so that a broken one breaks nothing else. The exit
    code is that of the first problem found.
    """
    from llmfw.errors import LlmfwError
    from llmfw.plugins import Catalog
    from llmfw.plugins.foreign import find_foreign

    catalog = Catalog.scan()
    rows = [examined(entry, catalog) for entry in catalog.entries]
    foreign = find_foreign()
    problems = [str(problem) for problem in catalog.problems]
    problems += [foreign.message] if foreign else []
    if json:
        write_json({"plugins": rows, "problems": problems, "interpreter": sys.executable})
    else:
        heads = ("name", "distribution", "version", "state", "seconds")
        table = [[r["name"], r["dist"], r["version"], r["state"], r["seconds"]] for r in rows]
        write_table(heads, table)
        for line in problems:
            write(f"problem: {line}\n")
        write(f"interpreter: {sys.executable}\n")
    codes = [code for row in rows if (code := int(row["exit_code"]))]
    if foreign:
        codes.insert(0, foreign.error().exit_code)
    if catalog.problems:
        codes.append(LlmfwError.exit_code)
    if codes:
        raise typer.Exit(codes[0])


def _row(entry: PluginEntry, catalog: Catalog) -> dict[str, str]:
    return {
        "group": entry.group,
        "name": entry.name,
        "dist": entry.dist,
        "version": entry.version,
        "value": entry.value,
        "state": _state(entry, catalog),
    }


def _state(entry: PluginEntry, catalog: Catalog) -> str:
    """What stands in the way of an entry, as far as metadata tell."""
    from llmfw.plugins.compat import misfits
    from llmfw.plugins.switches import PluginSwitches

    switches = PluginSwitches.from_environment(catalog.distributions)
    refusal = switches.refusal(entry.dist)
    if refusal:
        return refusal
    if entry.is_fallback and switches.no_fallback:
        return f"switched off by {switches.no_fallback}"
    unmet = misfits(entry.requires, catalog.path)
    if unmet:
        return "; ".join(misfit.reason for misfit in unmet)
    rivals = [
        other.label
        for other in catalog.entries
        if (other.group, other.name) == (entry.group, entry.name)
        and other != entry
        and switches.refusal(other.dist) is None
    ]
    if not rivals:
        return "ok"
    if entry.key in switches.prefer:
        return f"preferred to {', '.join(rivals)}"
    return f"conflicts with {', '.join(rivals)}"


def _entries_of(catalog: Catalog, distribution: str) -> tuple[PluginEntry, ...]:
    from packaging.utils import canonicalize_name

    from llmfw.errors import UsageError
    from llmfw.plugins.switches import nearest_hint

    entries = catalog.distributions.get(canonicalize_name(distribution))
    if not entries:
        raise UsageError(
            f"no plugin {distribution!r} is installed",
            hint=nearest_hint(distribution, catalog.distributions, "installed"),
        )
    return entries


def _lines(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return str(value)


def examined(entry: PluginEntry, catalog: Catalog) -> dict[str, str]:
    """An entry's row, probed in a process of its own unless metadata rule it out already."""
    from llmfw.errors import PluginConflictError, PluginIncompatibleError

    row = {**_row(entry, catalog), "seconds": "", "exit_code": "0"}
    if row["state"].startswith("requires"):
        row["exit_code"] = str(PluginIncompatibleError.exit_code)
        return row
    if row["state"].startswith("conflicts"):
        row["exit_code"] = str(PluginConflictError.exit_code)
        return row
    if row["state"] != "ok" and not row["state"].startswith("preferred"):
        return row
    row.update(_probe(entry))
    return row


def _probe(entry: PluginEntry) -> dict[str, str]:
    """Import the entry and hold its hooks against the contract, in another process."""
    arguments = json_module.dumps([entry.group, entry.name, entry.value, entry.dist, entry.version])
    command = [sys.executable, "-m", "llmfw_cli.probe", arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False
        )
        found = json_module.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"state": f"took more than {PROBE_SECONDS:.0f} s to import", "exit_code": "8"}
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["no word of why"])[-1]
        return {"state": f"ended with code {done.returncode}: {last}", "exit_code": "8"}
    return {str(key): str(value) for key, value in found.items()}


def _tell_problems(catalog: Catalog) -> None:
    from llmfw_cli.output import note

    for problem in catalog.problems:
        note(f"warning: the metadata of {problem}")
