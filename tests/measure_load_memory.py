"""How much memory loading takes: `python tests/measure_load_memory.py [CHECKPOINT] [options]`.

Without a checkpoint it makes one of 200 MB in a temporary directory. Prints one line of JSON: bytes
of the model and of its largest tensor, and the peak of this process's resident memory (anonymous
and mapped) above what it was before loading.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from llmfw.weights import Checkpoint, load_weights, open_checkpoint, plan_weights
from llmfw.weights.loader import LoadDtype


def resident() -> int:
    """Bytes of this process in memory, files mapped by it included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS"))


def meta_model(checkpoint: Checkpoint) -> nn.Module:
    """A model with one parameter a tensor, all on the meta device."""
    model = nn.Module()
    for name in checkpoint.names():
        info = checkpoint.info(name)
        *path, attribute = name.split(".")
        owner = model
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        empty = torch.empty(info.shape, dtype=info.dtype, device="meta")
        owner.register_parameter(attribute, nn.Parameter(empty, requires_grad=False))
    return model


class PeakWatch(threading.Thread):
    """Samples the resident memory once a millisecond."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.peak = resident()
        self.done = False

    def run(self) -> None:
        """Sample until `done`."""
        while not self.done:
            self.peak = max(self.peak, resident())
            time.sleep(0.001)


def measure(path: Path, threads: int, dtype: LoadDtype) -> dict[str, float]:
    """Loads the checkpoint and watches."""
    checkpoint = open_checkpoint(path)
    model = meta_model(checkpoint)
    plan = plan_weights(model, checkpoint)
    torch.zeros(1 << 20).add_(1)  # what torch itself takes at first use
    watch = PeakWatch()
    watch.start()
    report = load_weights(model, plan, checkpoint, threads=threads, dtype=dtype)
    watch.done = True
    watch.join()
    largest = max(checkpoint.info(name).nbytes for name in checkpoint.names())
    return {
        "model_bytes": report.nbytes,
        "largest_tensor_bytes": largest,
        "peak_bytes": watch.peak - watch.before,
        "threads": threads,
        "seconds": round(report.seconds, 3),
    }


def main() -> None:
    """Reads the arguments, measures, prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"))
    args = parser.parse_args()
    dtype: LoadDtype = getattr(torch, args.dtype) if args.dtype else "declared"
    with tempfile.TemporaryDirectory() as folder:
        path = args.checkpoint or Path(folder)
        if args.checkpoint is None:
            save_file(
                {f"layers.{index}.weight": torch.ones(2 << 20) for index in range(25)},
                path / "model.safetensors",
            )
        sys.stdout.write(json.dumps(measure(path, args.threads, dtype)) + "\n")


if __name__ == "__main__":
    main()
