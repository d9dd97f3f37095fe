"""`llmfw kernels`: the kernels of the installed packs, and why some are left out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmfw_cli.groups import takes_groups
from llmfw_cli.options import CommonOptions, JsonOption
from llmfw_cli.output import write, write_json, write_table

if TYPE_CHECKING:
    from llmfw.ops.kernel import DeviceInfo, Kernel

app = typer.Typer(help="Show the kernels at hand.", no_args_is_help=True)


@app.command("list")
@takes_groups
def list_kernels(
    common: CommonOptions,
    device: Annotated[
        str, typer.Option(envvar="LLMFW_DEVICE", help="auto, cpu, cuda or cuda:N.")
    ] = "auto",
    json: JsonOption = False,
) -> None:
    """List the kernels of the installed packs, and the packs that were left out with the reason."""
    from llmfw.models.settings import choose_device
    from llmfw.ops.device import device_info
    from llmfw.plugins import Catalog, collect_kernels, load_kernel_packs

    info = device_info(choose_device(device))
    packs, dropped = load_kernel_packs(info.features, Catalog.scan())
    kernels, more = collect_kernels(packs, info)
    rows = [_row(kernel, info) for kernel in sorted(kernels, key=lambda k: (k.op, -k.priority))]
    problems = [
        {"pack": each.pack, "distribution": each.label, "reason": each.reason}
        for each in (*dropped, *more)
    ]
    if json:
        features = sorted(info.features)
        write_json(
            {
                "device": str(info.device),
                "features": features,
                "kernels": rows,
                "left_out": problems,
            }
        )
        return
    write(f"device {info.device}: {' '.join(sorted(info.features))}\n")
    heads = ("op", "kernel", "pack", "priority", "dtypes", "state")
    write_table(heads, [[str(row[head]) for head in heads] for row in rows])
    for problem in problems:
        write(f"left out: {problem['pack']} of {problem['distribution']}: {problem['reason']}\n")


def _row(kernel: Kernel, info: DeviceInfo) -> dict[str, Any]:
    missing = [feature for feature in kernel.requires if feature not in info.features]
    return {
        "op": kernel.op,
        "kernel": kernel.name,
        "pack": kernel.pack,
        "priority": kernel.priority,
        "dtypes": ", ".join(kernel.dtypes),
        "state": f"needs {', '.join(missing)}" if missing else "at hand",
    }
