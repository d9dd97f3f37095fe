"""`open_checkpoint`: the right reader for a path."""

from __future__ import annotations

from pathlib import Path

from llmfw.config.reading import read_json
from llmfw.errors import CheckpointError
from llmfw.weights.block_scales import BlockScaledCheckpoint, block_size_in, has_block_scales
from llmfw.weights.checkpoint import Checkpoint
from llmfw.weights.converted_config import is_converted
from llmfw.weights.mxfp4 import Mxfp4Checkpoint, has_mxfp4
from llmfw.weights.safetensors_reader import open_safetensors

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_PICKLE_CURE = (
    "convert it once to safetensors, on a machine where you trust it: "
    "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT, safe_serialization=True)"
)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a directory with safetensors, or a `.safetensors` or `.gguf` file; headers only.

    Of a converted checkpoint, the first rank's tensors. Float8 weights with a scale a block, and
    MXFP4 ones, are dequantised when they are read.

    Raises:
        CheckpointError: If there is nothing to open, it is damaged, or it is a pickle (those can
            run code).
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory", file=str(path))
    if path.is_dir():
        return _open_directory(path)
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    if path.suffix == ".gguf":
        return _open_gguf(path)
    if path.suffix in PICKLE_SUFFIXES:
        raise _pickle_error(path)
    raise CheckpointError(
        f"{path}: not a checkpoint",
        hint="give a directory, a .safetensors or a .gguf file",
        file=str(path),
    )


def _open_directory(path: Path) -> Checkpoint:
    if is_converted(path):
        from llmfw.weights.converted import ConvertedCheckpoint

        return ConvertedCheckpoint(path)
    if any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json")):
        return _open_safetensors_directory(path)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return _open_gguf(ggufs[0])
    if ggufs:
        raise CheckpointError(
            f"{path}: several GGUF files: {', '.join(file.name for file in ggufs)}",
            hint="name the one to load",
        )
    pickles = [file for file in sorted(path.iterdir()) if file.suffix in PICKLE_SUFFIXES]
    if pickles:
        raise _pickle_error(pickles[0])
    raise CheckpointError(
        f"{path}: no weights there (looked for *.safetensors and *.gguf)",
        hint="download the weights",
    )


def _open_safetensors_directory(path: Path) -> Checkpoint:
    checkpoint = open_safetensors(path)
    if has_mxfp4(checkpoint):
        return Mxfp4Checkpoint(checkpoint)
    if not has_block_scales(checkpoint):
        return checkpoint
    config = path / "config.json"
    return BlockScaledCheckpoint(
        checkpoint, block_size_in(read_json(config) if config.is_file() else {})
    )


def _pickle_error(file: Path) -> CheckpointError:
    return CheckpointError(
        f"{file}: is a pickle, and reading one can run any code", hint=_PICKLE_CURE, file=str(file)
    )


def _open_gguf(path: Path) -> Checkpoint:
    from llmfw.weights.gguf_reader import GGUFCheckpoint

    return GGUFCheckpoint(path)
