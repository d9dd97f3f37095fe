"""The compiled object: built once with the compiler at hand, kept in the user's cache, loaded once
a process.

The object's name has a digest of the sources, the flags and the CPU's own flags, and one of the
compiler's version, so a change of any of them compiles afresh. A ready-made object, which an engine
directory brings along, serves whatever compiler made it, and where there is none. The object is
written under a name of its own and renamed into place: two processes may build at once and neither
ever loads half a file. A file that does not load is built again.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch  # noqa: F401  torch brings the OpenMP runtime whose symbols the object needs

from llmfw.cache import cache_dir as user_cache
from llmfw.cache import find_ready_made, note_used
from llmfw.errors import KernelError
from llmfw.ops.device import cpu_flags, find_compiler

logger = logging.getLogger("llmfw.kernels.cpu")

SOURCES = Path(__file__).parent
FOLDER = "kernels/cpu"
FLAGS = (
    "-O3",
    "-march=native",
    "-ffp-contract=off",  # products and sums are fused where the source says so: draws are exact
    "-std=c++17",
    "-fPIC",
    "-shared",
    "-w",
)
COMPILE_SECONDS = 300

NativeFunction = Callable[..., object]


def problem() -> str | None:
    """Why the kernels cannot serve on this machine, or None when they are built and loaded.

    The first call compiles or loads; a failure is logged once and remembered.
    """
    return _attempt()[1]


def functions() -> Mapping[str, NativeFunction]:
    """The native functions by name, e.g. "rms_norm_bf16".

    Raises:
        KernelError: If they cannot be built or loaded; the message is that of `problem`.
    """
    loaded, reason = _attempt()
    if loaded is None:
        raise KernelError(f"the CPU kernels cannot be used: {reason}", hint="see docs/kernels.md")
    return loaded


def forget() -> None:
    """Forget the outcome of the first attempt, so that the next use tries again (for tests)."""
    _attempt.cache_clear()


@functools.cache
def _attempt() -> tuple[Mapping[str, NativeFunction] | None, str | None]:
    try:
        return _load(), None
    except KernelError as exc:
        logger.warning("torch's references serve in place of the CPU kernels: %s", exc.message)
        return None, exc.message


def _load() -> dict[str, NativeFunction]:
    stem = f"{FOLDER}/kernels-{machine_digest()}"
    for name, ready in find_ready_made(f"{stem}-").items():
        try:
            found = load_object_file(ready)
        except OSError as exc:
            logger.warning("%s does not load: %s", ready, exc)
        else:
            note_used(name, ready)
            return found
    compiler = find_compiler()
    if compiler is None:
        raise KernelError("no C++ compiler (g++, clang++ or CXX)")
    name = f"{stem}-{_compiler_digest(compiler)}.so"
    path = user_cache() / name
    found = _load_or_build(compiler, path)
    note_used(name, path)
    return found


def _load_or_build(compiler: str, path: Path) -> dict[str, NativeFunction]:
    if os.path.exists(path):  # Path.exists raises where a folder above may not be entered
        try:
            return load_object_file(path)
        except OSError as exc:
            logger.warning("%s does not load and is built again: %s", path, exc)
    _compile(compiler, path)
    try:
        return load_object_file(path)
    except OSError as exc:
        raise KernelError(f"the compiled kernels do not load: {exc}") from exc


def cache_dir() -> Path:
    """Where compiled kernels are kept."""
    return user_cache() / FOLDER


def machine_digest() -> str:
    """A digest of the sources, the compiler's flags and the CPU's: who may run an object."""
    digest = hashlib.sha256()
    for source in sorted((*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h"))):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    for fact in (*FLAGS, *sorted(cpu_flags())):
        digest.update(fact.encode() + b"\0")
    return digest.hexdigest()[:24]


def _compiler_digest(compiler: str) -> str:
    return hashlib.sha256(_run([compiler, "--version"]).encode()).hexdigest()[:12]


def _compile(compiler: str, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(suffix=".so", prefix="building-", dir=path.parent)
    except OSError as exc:
        raise KernelError(f"the kernel cache {path.parent} cannot be written: {exc}") from exc
    os.close(handle)
    try:
        logger.info("compiling the CPU kernels with %s, once", compiler)
        _run([compiler, *FLAGS, str(SOURCES / "module.cpp"), "-o", name])
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=COMPILE_SECONDS,
            check=False,
            errors="replace",
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise KernelError(f"{command[0]} cannot be run: {exc}") from exc
    if done.returncode:
        lines = [
            line for line in done.stderr.splitlines() if "error" in line
        ] or done.stderr.splitlines()
        reason = lines[0].strip() if lines else f"exit status {done.returncode}"
        raise KernelError(f"{command[0]} fails: {reason}")
    return done.stdout


class _MethodDef(ctypes.Structure):
    """CPython's PyMethodDef (stable ABI)."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("call", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    ]


def load_object_file(path: Path) -> dict[str, NativeFunction]:
    """The callables of a compiled object by name.

    Raises:
        OSError: If it is no such object or needs symbols that this process lacks.
    """
    native = ctypes.PyDLL(str(path))
    new_function = ctypes.pythonapi.PyCFunction_NewEx
    new_function.restype = ctypes.py_object
    new_function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    try:
        table = ctypes.addressof(_MethodDef.in_dll(native, "llmfw_methods"))
    except ValueError as exc:
        raise OSError(f"{path} holds no table of kernels") from exc
    found: dict[str, NativeFunction] = {}
    while name := (method := _MethodDef.from_address(table)).name:
        found[name.decode()] = new_function(ctypes.addressof(method), None, None)
        table += ctypes.sizeof(_MethodDef)
    return found
