"""`llmfw env`: what a report of a problem should tell of the machine."""

from __future__ import annotations

import os
import platform
import sys
from typing import Any

from llmfw_cli.groups import takes_groups
from llmfw_cli.options import CommonOptions, JsonOption
from llmfw_cli.output import write, write_facts, write_json
from llmfw_cli.versions import version_of, versions


@takes_groups
def env(common: CommonOptions, json: JsonOption = False) -> None:
    """Print versions, devices and settings, for reports of problems."""
    found = {
        "versions": {**versions(), **_gpu_packages()},
        "machine": _machine(),
        "devices": _devices(),
        "plugins": _plugins(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if _is_setting(k)},
    }
    if json:
        write_json(found)
        return
    for number, (title, facts) in enumerate(found.items()):
        write(f"\n{title}\n" if number else f"{title}\n")
        write_facts(facts or {"none": ""}, indent="  ")


def _gpu_packages() -> dict[str, str]:
    names = ("cupy-cuda12x", "cupy-cuda13x", "triton")
    return {name: version for name in names if (version := version_of(name)) is not None}


def _machine() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "interpreter": sys.executable,
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory": _memory(),
    }


def _memory() -> str:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return "unknown"
    return f"{size / 2**30:.1f} GiB"


def _devices() -> dict[str, str]:
    """Each device with the features that kernels may require; this imports torch."""
    import torch

    from llmfw.ops.device import device_info

    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    facts = {}
    for device in devices:
        features = " ".join(sorted(device_info(device).features))
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
        facts[str(device)] = f"{name} ({features})"
    facts["threads"] = str(torch.get_num_threads())
    facts["cuda of torch"] = str(torch.version.cuda or "none")
    return facts


def _processor() -> str:
    return platform.processor() or platform.machine()


def _plugins() -> dict[str, str]:
    from llmfw.plugins import Catalog

    catalog = Catalog.scan()
    return {
        entries[0].label: ", ".join(f"{entry.group}:{entry.name}" for entry in entries)
        for entries in catalog.distributions.values()
    }


def _is_setting(name: str) -> bool:
    return name.startswith(("LLMFW_", "OMP_", "MKL_", "CUDA_", "HF_H", "TORCH"))
