"""Norms as parts of the products beside them: when a stock decoder has them so, and that it is
the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from llmfw import ModelConfig, RopeParams
from llmfw.attention.metadata import LayerCache
from llmfw.layers import GatedMLP, Linear, stock_layer
from llmfw.models import DecoderSpec, bind_tree, finish_loading
from llmfw.models.decoder import StockDecoderLayer, StockDecoderModel
from llmfw.models.weights import materialize
from llmfw.ops import reference
from llmfw.ops.inputs import paged_batch
from llmfw.ops.kernel import DeviceInfo, Kernel
from llmfw.ops.table import OpTable

HERE = __name__
FEW, MANY = (((1, 1), (1, 16), (1, 33)), 0), (((5, 5), (1, 17)), 1)  # 3 and 6 rows
SPEC = DecoderSpec(
    vocab_size=40,
    hidden_size=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=56,
    rope=RopeParams(dim=16, max_positions=128),
)
calls: list[str] = []


def counted(context) -> Callable[..., Any]:
    """An op by its reference, for at most 4 rows where rows matter."""

    def call(*args: Any) -> Any:
        calls.append(context.op)
        return getattr(reference, context.op)(*args)

    call.serves_rows = lambda rows: rows <= 4  # type: ignore[attr-defined]
    return call


DIVIDED = ("add_linear", "normed_linear", "normed_gated_linear")
PACK = tuple(
    Kernel(op, f"one.{op}", f"{HERE}:counted", priority=50).from_pack("one")
    for op in ("linear", "gated_linear", "rms_norm", "add_rms_norm", *DIVIDED)
)
OTHER = Kernel("add_rms_norm", "other.norm", f"{HERE}:counted", priority=70).from_pack("other")
Maker = Callable[..., nn.Module | None]


def nothing(kind: str, role: str, config: ModelConfig, index: int | None, spec: Any) -> None:
    """No layer of a plugin's own."""


def decoder(
    spec: DecoderSpec = SPEC,
    kernels: tuple[Kernel, ...] = PACK,
    select: str = "auto",
    own: Maker = nothing,
) -> StockDecoderModel:
    """A stock decoder with random weights, whose layers `own` may make in another way."""
    ops = OpTable(DeviceInfo(torch.device("cpu"), frozenset()), kernels, select)

    def make(kind: str, role: str, config: ModelConfig, index: int | None, given: Any) -> nn.Module:
        made = own(kind, role, config, index, given)
        if made is not None:
            return made
        if kind == "decoder":
            return StockDecoderLayer(config, index or 0, **given)
        return stock_layer(kind, role, config, index, given)

    config: ModelConfig = ModelConfig(
        pretrained_config=None, dtype=torch.float32, ops=ops, layer_factory=make
    )
    made = StockDecoderModel(config, spec)
    bind_tree(made, config)
    materialize(made, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    finish_loading(made)
    return made


def forward(model: StockDecoderModel, batch=FEW) -> torch.Tensor:
    """Final hidden states; `calls` then has the ops in their order."""
    generator = torch.Generator().manual_seed(1)
    metadata, _, blocks = paged_batch(*batch, 16, generator, torch.device("cpu"))
    caches = {}
    for index in range(len(model.layers)):
        k, v = torch.randn(2, blocks, 16, 2, 16, generator=generator)
        caches[index] = LayerCache(k, v)
    metadata = replace(metadata, caches=caches)
    tokens = torch.randint(0, SPEC.vocab_size, (sum(metadata.query_lens),), generator=generator)
    calls.clear()
    return model(metadata, tokens)


LAYER = ["add_linear", "normed_gated_linear", "add_linear", "normed_linear"]
SHARED = ["rms_norm", "linear", *LAYER, *LAYER, *LAYER[:2], "linear", "add_rms_norm"]


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        replace(SPEC, qkv_bias=True, mlp_bias=False, qk_norm=True),
        replace(SPEC, norm_offset=1.0, norm_eps=1e-2),
        replace(SPEC, num_layers=1),
    ],
    ids=["plain", "biases and head norms", "offset", "one layer"],
)
def test_the_hidden_states_are_the_same(spec: DecoderSpec) -> None:
    for batch, shared in ((FEW, True), (MANY, False)):
        expected = forward(decoder(spec, kernels=()), batch)
        found = forward(decoder(spec), batch)
        assert ("add_linear" in calls) == shared
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def test_no_norm_lies_between_two_products() -> None:
    """Head norms and rope belong to attention; the first and the last norm stay."""
    forward(decoder())
    assert calls == SHARED


def test_the_sum_of_squares_may_be_left_to_the_next_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = forward(decoder())
    whole = reference.add_linear
    monkeypatch.setattr(reference, "add_linear", lambda *args: (whole(*args)[0], None))
    torch.testing.assert_close(forward(decoder()), expected, rtol=1e-6, atol=1e-6)
    assert calls == SHARED


def any_rows(context) -> Callable[..., Any]:
    """An op by its reference that says nothing of rows."""
    return lambda *args: counted(context)(*args)


def test_an_op_that_says_nothing_of_rows_serves_any() -> None:
    silent = tuple(replace(kernel, factory=f"{HERE}:any_rows") for kernel in PACK)
    expected = forward(decoder(kernels=()), MANY)
    found = forward(decoder(kernels=silent), MANY)
    assert calls == SHARED
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("kernels", "select"),
    [
        (PACK, "reference"),
        (PACK, "-one.add_linear"),
        (PACK, "normed_linear=reference"),
        (PACK, "-one.add_rms_norm"),
        ((*PACK, OTHER), "auto"),  # another pack's norm is not bypassed
        ((*PACK[:-1],), "auto"),
    ],
)
def test_without_one_of_the_kernels_norms_are_their_own(
    kernels: tuple[Kernel, ...], select: str
) -> None:
    expected = forward(decoder(kernels=()))
    found = forward(decoder(kernels=kernels, select=select))
    assert not set(calls) & set(DIVIDED)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"o_bias": True},
        {"mlp_bias": True},
        {"norm": "layer"},
        {"activation": "gelu"},
        {"gated": False},
        {"block": "parallel"},
        {"block": "sandwich"},
        {"residual_scale": 0.5},
    ],
    ids=str,
)
def test_other_layers_have_norms_of_their_own(changes: dict[str, Any]) -> None:
    spec = replace(SPEC, **changes)
    expected = forward(decoder(spec, kernels=()))
    found = forward(decoder(spec))
    assert not set(calls) & set(DIVIDED)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


class Doubled(GatedMLP):
    """A plugin's own."""

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return 2 * super().forward(x)


def test_a_plugins_own_layer_is_not_passed_over() -> None:
    def own(kind, role, config, index, given):
        if kind != "mlp" or index != 1:
            return None
        given = {key: value for key, value in given.items() if key != "gated"}
        return Doubled(config=config, layer_idx=index, **given)

    expected = forward(decoder(kernels=(), own=own))
    found = forward(decoder(own=own))
    assert not set(calls) & set(DIVIDED)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    assert not torch.allclose(found, forward(decoder()))


def test_who_listens_to_a_module_hears_it() -> None:
    model = decoder()
    heard: list[tuple[int, ...]] = []
    norm = model.layers[1].post_attention_layernorm
    handle = norm.register_forward_hook(lambda *args: heard.append(args[2][0].shape))
    plain = forward(model)
    assert heard == [(3, 24)]
    assert not set(calls) & set(DIVIDED)
    handle.remove()
    torch.testing.assert_close(forward(model), plain, rtol=2e-5, atol=2e-5)
    assert calls == SHARED


def test_who_listens_to_all_modules_hears_them() -> None:
    model = decoder()
    heard: list[nn.Module] = []
    handle = register_module_forward_hook(lambda module, *_: heard.append(module))
    try:
        forward(model)
    finally:
        handle.remove()
    assert all(layer.post_attention_layernorm in heard for layer in model.layers)
    forward(model)
    assert calls == SHARED


class Twice(nn.Module):
    """Another layer's result, doubled."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.weight, self.bias = inner.weight, inner.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(x)


class TwiceLinear(Linear):
    """The same as a class."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def put_in_place(model: StockDecoderModel) -> None:
    attention = model.layers[1].self_attn
    attention.qkv_proj = Twice(attention.qkv_proj)


def change_class(model: StockDecoderModel) -> None:
    model.layers[1].self_attn.o_proj.__class__ = TwiceLinear


def change_forward(model: StockDecoderModel) -> None:
    mlp = model.layers[1].mlp
    own = mlp.forward
    mlp.forward = lambda x, **kwargs: 2 * own(x, **kwargs)


def leave_layers_out(model: StockDecoderModel) -> None:
    del model.layers[2:]


def replace_layers(model: StockDecoderModel) -> None:
    model.layers = nn.ModuleList(list(model.layers)[:2])


@pytest.mark.parametrize(
    "change", [put_in_place, change_class, change_forward, leave_layers_out, replace_layers]
)
def test_a_module_changed_after_the_build_is_not_passed_over(
    change: Callable[[StockDecoderModel], None],
) -> None:
    model, other = decoder(), decoder(kernels=())
    before = forward(model)
    for each in (model, other):
        change(each)
    expected = forward(other)
    found = forward(model)
    assert not set(calls) & set(DIVIDED)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    assert not torch.allclose(found, before)


def test_the_last_norm_may_be_another() -> None:
    models = decoder(), decoder(kernels=())
    for model in models:
        own = model.norm
        model.norm = nn.Identity()
        model._finish = lambda hidden, residual, own=own: 2 * own(hidden, residual)[0]
    found, expected = (forward(model) for model in models)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def test_arguments_for_layers_reach_them() -> None:
    seen: list[Any] = []

    class Told(StockDecoderLayer):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            seen.append(kwargs.pop("told", None))
            return super().forward(*args, **kwargs)

    model = decoder()
    shared = model._shared_norms
    assert shared is not None
    for layer in model.layers:
        layer.__class__ = Told
    metadata, _, blocks = paged_batch(*FEW, 16, torch.Generator().manual_seed(1), "cpu")
    caches = {i: LayerCache(*torch.zeros(2, blocks, 16, 2, 16)) for i in range(3)}
    model(replace(metadata, caches=caches), torch.tensor([1, 2, 3]), told=7)
    assert seen == [7, 7, 7]


def test_a_weight_in_a_layout_of_its_own_is_left_to_its_kernel() -> None:
    model = decoder()
    model.layers[2].mlp.down_proj.prepared = True
    model.post_load()
    forward(model)
    assert not set(calls) & set(DIVIDED)
