"""Putting our layers into transformers' tree: linear layers, norms, embeddings, gated MLPs.

`LLMFW_REPLACE_LAYERS=off` leaves transformers' own, all but attention.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from llmfw import ModelConfig
from llmfw.errors import UsageError
from llmfw.layers import LMHead
from llmfw_transformers.recognise import Norm, gated_mlp_of, norm_of

VARIABLE = "LLMFW_REPLACE_LAYERS"


def replaces_layers() -> bool:
    """Whether layers of ours take the place of transformers'.

    Raises:
        UsageError: If `LLMFW_REPLACE_LAYERS` is neither "on" nor "off".
    """
    value = os.environ.get(VARIABLE, "on")
    if value not in ("on", "off"):
        raise UsageError(f"{VARIABLE} is {value!r}", hint="use on or off")
    return value == "on"


def replace_layers(
    model: Any, inputs: Mapping[str, torch.Tensor], config: ModelConfig[Any]
) -> Counter[str]:
    """Replace what is recognised by layers of ours, made through the `llmfw_layer` hook.

    Each keeps its path and the names of its parameters.

    Args:
        model: transformers' model, on the meta device.
        inputs: Each linear layer's input in the dry run; layers of one module that share theirs
            become one product.
        config: The model's configuration.

    Returns:
        How many of each kind were replaced.
    """
    maker = _Maker(model, config)
    replaced: Counter[str] = Counter()
    _replace_gated_mlps(maker, replaced)
    _fuse_shared_inputs(maker, inputs, replaced)
    _replace_single_layers(maker, replaced)
    _replace_head(maker)
    return replaced


def _replace_gated_mlps(maker: _Maker, replaced: Counter[str]) -> None:
    for path, module in maker.modules():
        gated = gated_mlp_of(module)
        if gated is not None:
            maker.put(path, over_rows(maker.make("mlp", path, **vars(gated))))
            replaced["gated MLPs"] += 1


def _fuse_shared_inputs(
    maker: _Maker, inputs: Mapping[str, torch.Tensor], replaced: Counter[str]
) -> None:
    for paths in _sharing(maker.model, inputs):
        if not any(map(maker.keeps, paths)):
            _fuse(maker, paths)
            replaced["linear layers"] += len(paths)
            replaced["fused products"] += 1


def _replace_single_layers(maker: _Maker, replaced: Counter[str]) -> None:
    head = maker.model.get_output_embeddings()
    known: dict[Any, Norm | None] = {}  # layers are alike, so a norm is tried once
    for path, module in maker.modules():
        made: nn.Module | None = None
        kind = "norms"
        if module is head:
            continue
        if type(module) is nn.Linear:
            made, kind = over_rows(maker.linear(path, module)), "linear layers"
        elif type(module) is nn.Embedding and module.max_norm is None:
            made, kind = maker.embedding(path, module), "embeddings"
        elif type(module) is nn.LayerNorm and len(module.normalized_shape) == 1:
            made = maker.layer_norm(path, module)
        else:
            facts = _facts(module)
            if facts not in known:
                known[facts] = norm_of(module)
            norm = known[facts]
            made = None if norm is None else maker.norm(path, norm)
        if made is not None:
            maker.put(path, made)
            replaced[kind] += 1


class _Maker:
    """Makes layers through the hook, and puts them in the place of others."""

    def __init__(self, model: Any, config: ModelConfig[Any]) -> None:
        self.model = model
        self.config = config
        self._in_float32 = float32_names(model, config.dtype)

    def keeps(self, path: str) -> bool:
        """Whether a module stays transformers': the root, and what has a parameter in float32."""
        return not path or any(each.startswith(f"{path}.") for each in self._in_float32)

    def modules(self) -> list[tuple[str, nn.Module]]:
        """The modules as they are now, but for those that stay."""
        return [(path, m) for path, m in self.model.named_modules() if not self.keeps(path)]

    def make(self, kind: str, path: str, **spec: Any) -> nn.Module:
        numbers = [int(part) for part in path.split(".") if part.isdigit()]
        role = path.rpartition(".")[2]
        layer = numbers[0] if numbers else None
        return self.config.make(kind, role, layer_idx=layer, **spec)

    def put(self, path: str, module: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        self.model.get_submodule(parent)._modules[name] = module

    def linear(self, path: str, module: nn.Linear) -> nn.Module:
        sizes = {"in_features": module.in_features, "out_features": module.out_features}
        return self.make("linear", path, **sizes, bias=module.bias is not None)

    def embedding(self, path: str, module: nn.Embedding) -> nn.Module:
        sizes = module.num_embeddings, module.embedding_dim
        return self.make("embedding", path, num_embeddings=sizes[0], embedding_dim=sizes[1])

    def layer_norm(self, path: str, module: nn.LayerNorm) -> nn.Module:
        spec = {
            "hidden_size": module.normalized_shape[0],
            "eps": module.eps,
            "bias": module.bias is not None,
            "elementwise_affine": module.elementwise_affine,
        }
        return self.make("norm", path, norm_kind="layer", **spec)

    def norm(self, path: str, norm: Norm) -> nn.Module:
        spec: dict[str, Any] = {"hidden_size": norm.size, "eps": norm.eps, "norm_kind": norm.kind}
        return self.make("norm", path, offset=norm.offset, bias=False, **spec)


def _replace_head(maker: _Maker) -> None:
    """The language-model head, tied to the embedding where transformers ties it."""
    model = maker.model
    head = model.get_output_embeddings()
    paths = [path for path, module in model.named_modules() if module is head]
    if type(head) is not nn.Linear or len(paths) != 1 or maker.keeps(paths[0]):
        return
    sizes = {"num_embeddings": head.out_features, "embedding_dim": head.in_features}
    made = maker.make("lm_head", paths[0], bias=head.bias is not None, **sizes)
    tied_to = model.get_expanded_tied_weights_keys(all_submodels=True).get(f"{paths[0]}.weight")
    if tied_to is not None:
        embedding = model.get_submodule(tied_to.rpartition(".")[0])
        if not isinstance(made, LMHead):
            return
        made.tie_weights(embedding)
    maker.put(paths[0], over_rows(made))


def tie_parameters(model: Any) -> None:
    """Make tied parameters one object, where no layers of ours declare what is tied."""
    for tied, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        owner, _, name = tied.rpartition(".")
        model.get_submodule(owner)._parameters[name] = model.get_parameter(source)


def _sharing(model: Any, inputs: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
    """Linear layers of one module that are given the same tensor: several paths each."""
    groups: dict[tuple[str, int, bool], list[str]] = {}
    for path, tensor in inputs.items():
        module = _linear_at(model, path)
        if module is not None and module is not model.get_output_embeddings():
            parent = path.rpartition(".")[0]
            groups.setdefault((parent, id(tensor), module.bias is not None), []).append(path)
    yield from (paths for paths in groups.values() if len(paths) > 1)


def _linear_at(model: Any, path: str) -> nn.Linear | None:
    try:
        module = model.get_submodule(path)
    except AttributeError:  # a layer around it has been replaced
        return None
    return module if type(module) is nn.Linear else None


def _fuse(maker: _Maker, paths: list[str]) -> None:
    linears = [maker.model.get_submodule(path) for path in paths]
    parent, _, _ = paths[0].rpartition(".")
    names = [path.rpartition(".")[2] for path in paths]
    fused = f"{parent}.{'_'.join(names)}" if parent else "_".join(names)
    sizes = [each.out_features for each in linears]
    product = maker.make(
        "linear",
        fused,
        in_features=linears[0].in_features,
        out_features=sum(sizes),
        bias=linears[0].bias is not None,
        shards=tuple(zip(names, sizes, strict=True)),
    )
    shared = SharedProduct(product, sizes)
    for index, path in enumerate(paths):
        maker.put(path, Part(shared, index))
    maker.put(fused, product)


class SharedProduct:
    """One product for several linear layers that are given the same tensor one after the other.

    Args:
        product: The fused linear layer.
        sizes: Output features of each part.
    """

    def __init__(self, product: nn.Module, sizes: list[int]) -> None:
        self.product = product
        self.sizes = sizes
        self._x: torch.Tensor | None = None
        self._parts: tuple[torch.Tensor, ...] = ()
        self._taken = 0

    def part(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Part `index` of the product of x; the product is made when a new x comes."""
        if x is not self._x:
            out = self.product(x.reshape(-1, x.shape[-1]))
            self._parts = out.view(*x.shape[:-1], -1).split(self.sizes, -1)
            self._x, self._taken = x, 0
        part = self._parts[index].contiguous()
        self._taken += 1
        if self._taken == len(self.sizes):
            self._x, self._parts = None, ()
        return part


class Part(nn.Module):
    """Stands where a linear layer stood and gives its part of a fused product."""

    def __init__(self, shared: SharedProduct, index: int) -> None:
        super().__init__()
        self.shared = shared
        self.index = index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] -> [..., out_features of this part]."""
        return self.shared.part(self.index, x)


def float32_names(model: Any, dtype: torch.dtype) -> set[str]:
    """The parameters and buffers that transformers keeps in float32 in a model of `dtype`."""
    plan = [f".{name}." for name in model._get_dtype_plan(dtype)]
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    return {name for name in names if any(part in f".{name}." for part in plan)}


def keep_in_float32(model: Any, dtype: torch.dtype) -> None:
    """Declare what transformers keeps in float32 as such."""
    for path in float32_names(model, dtype):
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        if name in module._buffers:
            module._buffers[name] = module._buffers[name].float()
        else:
            module._parameters[name] = nn.Parameter(module._parameters[name].float())


def over_rows(module: nn.Module) -> nn.Module:
    """Let a layer of ours, which takes [tokens, features], take transformers' [1, tokens, ...]."""
    module.forward = _over_rows(module.forward)
    return module


def _over_rows(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def run(x: torch.Tensor) -> torch.Tensor:
        out = forward(x.reshape(-1, x.shape[-1]))
        return out.view(*x.shape[:-1], out.shape[-1])

    return run


def _facts(module: nn.Module) -> tuple[Any, ...]:
    """Equal for modules that compute the same."""
    plain = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str | tuple)}
    sizes = tuple(
        (name, tuple(each.shape)) for name, each in module._parameters.items() if each is not None
    )
    return (type(module), len(module._modules), sizes, repr(sorted(plain.items())))
