"""The contract between core and plugins: the hooks, what they are given and what they return.

An implementation is a function marked with `hookimpl`, in a module or as a method of an object,
that an entry point names (`FooForCausalLM = "llmfw_foo:plugin"` in the group `llmfw.models`):

    from llmfw.plugins import hookimpl

    @hookimpl
    def llmfw_config(raw, model_dir): ...

Rules for all hooks:

- Arguments are passed by name. An implementation may take fewer of them, in any order; one that the
  contract does not know, one with a default, and `*args` / `**kwargs` are refused, because pluggy
  would never fill them.
- "First result" hooks stop at the first implementation that does not return None. The model's own
  plugin is asked first, then the named extensions, then core's default, which always answers.
- `@hookimpl(wrapper=True)` wraps whatever the others return: `result = yield`, then return it or
  another. This is how an extension changes a model that it does not own.
- Hooks run while a model is found, built and loaded. None is called for a token.
- An implementation that raises is named in the error, with its distribution and version.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import nn

    from llmfw.config import ModelConfig
    from llmfw.models import DecoderModelForCausalLM
    from llmfw.ops.kernel import DeviceInfo, Kernel
    from llmfw.weights import Checkpoint, WeightMap

PROJECT = "llmfw"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


# -------------------------------------------------------------------------
# What the model is
# -------------------------------------------------------------------------


@hookspec(firstresult=True)
def llmfw_config(raw: Mapping[str, Any], model_dir: Path) -> Any | None:
    """Make the model's configuration object from its `config.json`.

    Implement it where transformers lacks the class, or where the file needs mending.

    :param raw: The parsed `config.json`, as it stands in the file. Do not change it.
    :param model_dir: The directory it was read from. Python files found there must not be run.
    :returns: An object with the fields as attributes and `to_dict()`: a transformers
        configuration, or one of the plugin's own; or None to leave it to the next
        one.

    Core's default makes the class that transformers knows for `model_type`.
    Called once for each model, first of all hooks. Stops at the first result that is not None.

    .. versionadded:: 0.1
    """


@hookspec(firstresult=True)
def llmfw_model(model_config: ModelConfig[Any]) -> DecoderModelForCausalLM[Any, Any] | None:
    """Build the whole model, its parameters on the meta device.

    Implement it where the stock decoder, described by a `DecoderSpec`, is not the model's shape.

    :param model_config: What the model is built from; `model_config.pretrained_config` is the
        result of `llmfw_config`, `model_config.make(kind, role, ...)` gives parts through
        `llmfw_layer`.
    :returns: The model: a `DecoderModelForCausalLM`, or None to leave it to the next one.

    Core's default is a stock decoder of `num_hidden_layers` layers, each from `llmfw_layer`.
    Called once for each model and rank, after `llmfw_config`, within `torch.device("meta")`.
    Stops at the first result that is not None.

    .. versionadded:: 0.1
    """


@hookspec(firstresult=True)
def llmfw_layer(
    kind: str,
    role: str,
    model_config: ModelConfig[Any],
    layer_idx: int | None,
    spec: Mapping[str, Any],
) -> nn.Module | None:
    """Build one part of the model.

    Implement it to replace a part (a norm, an attention) in a model that is otherwise stock; wrap
    it to change the parts of any model, which is what extensions do.

    :param kind: What is asked for: "decoder", "attention", "mlp", "norm", "linear", "embedding",
        ...
    :param role: Where it goes, in the words of the checkpoint: "q_proj", "input_layernorm",
        "self_attn", ...
    :param model_config: As in `llmfw_model`.
    :param layer_idx: The decoder layer it belongs to, counted from 0; None outside the layers.
    :param spec: The arguments of the stock constructor of that kind, by name.
    :returns: A module whose parameters are on the meta device, or None to leave it to the next one.

    Core's default is the stock layer of that kind.
    Called once for each part of each layer while the model is built. Stops at the first result that
    is not None; wrappers see that result.

    .. versionadded:: 0.1
    """


# -------------------------------------------------------------------------
# What its checkpoint holds
# -------------------------------------------------------------------------


@hookspec(firstresult=True)
def llmfw_weight_map(model_config: ModelConfig[Any], checkpoint: Checkpoint) -> WeightMap | None:
    """Say how the checkpoint's tensors become the model's parameters.

    Implement it where the checkpoint's names are not those of the module tree.

    :param model_config: As in `llmfw_model`.
    :param checkpoint: Format, names, shapes and dtypes, read from headers; no tensor is in memory
        yet.
    :returns: The ordered rules (rename, fuse, split, stack, transpose, tie, ignore), or None to
        leave it to the next one.

    Core's default takes the names of Hugging Face's decoders as they are, with fused modules filled
    as their declared shards say.
    Called once for each model and rank, after the model is built and before any tensor is read.
    Stops at the first result that is not None.

    .. versionadded:: 0.1
    """


# -------------------------------------------------------------------------
# What runs it
# -------------------------------------------------------------------------


@hookspec
def llmfw_kernels(device: DeviceInfo) -> Sequence[Kernel] | None:
    """Offer kernels for a device.

    Implement it in a kernel pack (entry-point group `llmfw.kernels`), or in a model's plugin for
    ops of its own.

    :param device: The torch device and what it can do, as feature strings ("cuda", "sm_90",
        "avx512_bf16", ...).
    :returns: Kernels, each with what it requires; an empty list or None where there is nothing to
        offer.
        Declare only: import and compile in a kernel's factory, which runs when the kernel is
        chosen.

    Core's default offers none; each op has its torch reference.
    Called once for each model, before it is built. All results count; the op table chooses by
    requirements and priority.

    .. versionadded:: 0.1
    """


HOOK_NAMES = ("llmfw_config", "llmfw_model", "llmfw_layer", "llmfw_weight_map", "llmfw_kernels")
