"""Which of transformers' causal language models `llmfw new --from` writes right: the page about it.

Each model type is made tiny from its default configuration, saved, recognised from its config.json
and headers, and what would be written is held against transformers' logits. `python
tests/recognised.py` tries all (some minutes, at most 8 GiB) and writes docs/plugins/recognised.md;
with names of model types it tries these and prints what it finds.
"""

from __future__ import annotations

import logging
import resource
import signal
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmfw_cli.new import write
from llmfw_cli.new.recognise import recognise
from llmfw_cli.new.settle import Settled, settle
from llmfw_cli.new.shrink import names_of, shrink

PAGE = Path(__file__).resolve().parent.parent / "docs" / "plugins" / "recognised.md"
MOST_PARAMETERS, MOST_BYTES, MOST_SECONDS = 30_000_000, 7 << 30, 60
HEAD = """# What `llmfw new --from` writes right

Model types of transformers {version} whose plugin needs no line by hand: made tiny from the default
configuration and saved, recognised from config.json and the tensors' headers alone, the model that
would be written has every tensor of the checkpoint in its place and transformers' logits (greatest
difference below {allowed:g}). That is {right} of the {tried} causal language models in transformers
that could be made tiny this way, its encoders and hybrids included; for the others the plugin is
begun and what it lacks is named. `python tests/recognised.py` writes this page.

| model type | architecture | switches beyond the configuration |
|---|---|---|
"""


class TooSlow(Exception):
    """A model type took longer than it may."""


def architecture_of(model_type: str) -> str:
    """The class that transformers has for it."""
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    return names if isinstance(names, str) else names[0]


def tiny_config(model_type: str) -> transformers.PretrainedConfig:
    """The default configuration, shrunk."""
    default = CONFIG_MAPPING[model_type]()
    small = shrink(
        {**default.to_dict(), "architectures": [architecture_of(model_type)]}, names_of(default)
    )
    return type(default).from_dict(small)


def trial(model_type: str, folder: Path) -> Settled:
    """What is recognised of a tiny model, held against it."""
    config = tiny_config(model_type)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise MemoryError(f"{size} parameters")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return settle(recognise(folder))


def outcome(model_type: str) -> Settled | str:
    """What is recognised, or why there is nothing."""
    signal.alarm(MOST_SECONDS)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return trial(model_type, Path(folder))
    except Exception as exc:  # whatever some model's code raises when it is made small
        return f"{type(exc).__name__}: {str(exc).splitlines()[0] if str(exc) else ''}"
    finally:
        signal.alarm(0)


def right(settled: Settled) -> bool:
    """Whether nothing is left to write."""
    return settled.agrees and not write.unrecognised(settled.found)


def stop(*_: object) -> None:
    raise TooSlow(f"more than {MOST_SECONDS} s")


def main(model_types: list[str]) -> None:
    signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    logging.disable(logging.CRITICAL)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows, tried = [], 0
    for model_type in sorted(model_types or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        found = outcome(model_type)
        tried += isinstance(found, Settled)
        if isinstance(found, Settled) and right(found):
            switches = ", ".join(f"`{name}`" for name in found.found.switches)
            rows.append(f"| {model_type} | `{architecture_of(model_type)}` | {switches} |\n")
            print(f"{model_type}: right, {found.distance:.1e}", flush=True)
        else:
            print(f"{model_type}: {found if isinstance(found, str) else left(found)}", flush=True)
    if not model_types:
        facts = {"version": transformers.__version__, "allowed": 1e-3, "tried": tried}
        PAGE.write_text(HEAD.format(right=len(rows), **facts) + "".join(rows), "utf-8")


def left(settled: Settled) -> str:
    """What is not right yet, on one line."""
    distance = "" if settled.distance is None else f"differs by {settled.distance:.1e}"
    names = write.collapsed("\n".join(write.unrecognised(settled.found)))
    return " ".join((settled.reason or distance, *names[:3]))


if __name__ == "__main__":
    main(sys.argv[1:])
