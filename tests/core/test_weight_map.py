"""WeightMap: what each rule does, what it refuses, and that every combination can be undone."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfw.errors import UsageError, WeightError
from llmfw.weights import (
    MemoryCheckpoint,
    WeightMap,
    load_into,
    load_weights,
    open_checkpoint,
    plan_weights,
    save_checkpoint,
)
from llmfw.weights.expressions import reorder
from llmfw.weights.patterns import Pattern
from weight_modules import module_of

Tensors = dict[str, torch.Tensor]


def load(tensors: Tensors, weight_map: WeightMap, expected: Tensors) -> None:
    """Loads into a module of the expected shapes and compares values."""
    module = module_of(expected)
    load_into(module, tensors, weight_map)
    for name, value in expected.items():
        assert torch.equal(module.get_parameter(name), value), name


def counted(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


def test_no_rule_takes_names_as_they_are() -> None:
    load({"a": counted(2, 3)}, WeightMap(), {"a": counted(2, 3)})


def test_rename() -> None:
    load({"x.0.w": counted(2)}, WeightMap().rename("x.{i}.w", "w{i}"), {"w0": counted(2)})


def test_rename_many_at_once_and_swapped() -> None:
    rules = WeightMap().rename({"a.{p}": "c_{p}", "b.{p}": "a_{p}"})
    load({"a.x": counted(2), "b.x": counted(3)}, rules, {"c_x": counted(2), "a_x": counted(3)})


def test_rename_may_exchange_names() -> None:
    rules = WeightMap().rename("{i}.{j}", "{j}.{i}").rename("{i}.{j}", "n{i}_{j}")
    tensors = {"0.1": counted(2), "1.0": counted(3)}
    load(tensors, rules, {"n1_0": counted(2), "n0_1": counted(3)})


def test_rest_placeholder_spans_segments() -> None:
    rules = WeightMap().rename("model.text.{rest*}", "{rest*}").rename("a.b", "ab")
    load({"model.text.a.b": counted(2)}, rules, {"ab": counted(2)})


def test_fuse_along_either_dimension() -> None:
    a, b = counted(2, 3), counted(4, 3) + 10
    load({"a": a, "b": b}, WeightMap().fuse("ab", ["a", "b"]), {"ab": torch.cat([a, b])})
    load(
        {"a": a.t().contiguous(), "b": b.t().contiguous()},
        WeightMap().fuse("ab", ["a", "b"], dim=-1),
        {"ab": torch.cat([a.t(), b.t()], dim=1)},
    )


def test_split_by_sizes_and_equally() -> None:
    whole = counted(6, 2)
    sized = WeightMap().split("w", ["a", "b"], sizes=[4, 2])
    load({"w": whole}, sized, {"a": whole[:4], "b": whole[4:]})
    equal = WeightMap().split("w", ["a", "b"], dim=1)
    load({"w": whole}, equal, {"a": whole[:, :1], "b": whole[:, 1:]})


def test_stack_of_experts_then_fuse() -> None:
    tensors = {
        f"e.{e}.{w}": counted(2, 3) + 10 * e + 100 * (w == "up")
        for e in range(3)
        for w in ("gate", "up")
    }
    rules = (
        WeightMap()
        .stack("gate", "e.{e}.gate", count=3)
        .stack("up", "e.{e}.up", count=3)
        .fuse("gate_up", ["gate", "up"], dim=1)
    )
    gate, up = (torch.stack([tensors[f"e.{e}.{w}"] for e in range(3)]) for w in ("gate", "up"))
    load(tensors, rules, {"gate_up": torch.cat([gate, up], dim=1)})


def test_transpose() -> None:
    load({"w": counted(2, 3)}, WeightMap().transpose("w"), {"w": counted(2, 3).t()})


def test_reorder_serves_weight_and_bias_alike() -> None:
    heads, head_dim = 2, 3
    weight, bias = counted(heads * 3 * head_dim, 4), counted(heads * 3 * head_dim)
    rules = WeightMap().reorder("{p}", (heads, 3, head_dim), (1, 0, 2))
    expected = weight.view(heads, 3, head_dim, 4).transpose(0, 1).reshape(weight.shape)
    expected_bias = bias.view(heads, 3, head_dim).transpose(0, 1).reshape(-1)
    load({"w": weight, "b": bias}, rules, {"w": expected, "b": expected_bias})


def test_interleaved_qkv_reordered_and_split() -> None:
    weight = counted(2 * 3 * 2, 4)
    rules = WeightMap().reorder("w", (2, 3, -1), (1, 0, 2)).split("w", ["q", "k", "v"])
    q, k, v = weight.view(2, 3, 2, 4).transpose(0, 1).reshape(weight.shape).chunk(3)
    load({"w": weight}, rules, {"q": q, "k": k, "v": v})


def test_tie_takes_the_other_parameter_and_ignores_the_tensor() -> None:
    module = module_of({"a": counted(2), "b": counted(2)})
    rules = WeightMap().tie("b", "a")
    report = load_into(module, {"a": counted(2), "b": counted(2) + 1}, rules)
    assert module.b is module.a
    assert torch.equal(module.a, counted(2))
    assert report.ignored == 1


def test_tie_where_only_the_tied_tensor_is_there() -> None:
    module = module_of({"a": counted(2), "b": counted(2)})
    load_into(module, {"b": counted(2)}, WeightMap().tie("b", "a"))
    assert module.b is module.a
    assert torch.equal(module.a, counted(2))


def test_tie_of_unknown_parameters_is_a_problem() -> None:
    module = module_of({"a": counted(2)})
    with pytest.raises(WeightError, match=r"tie\(b = a\): no such parameter"):
        load_into(module, {"a": counted(2)}, WeightMap().tie("b", "a"))


def test_ignore_shows_its_reason_in_the_plan() -> None:
    module = module_of({"a": counted(2)})
    rules = WeightMap().ignore("{p*}.mask", "a constant")
    checkpoint = MemoryCheckpoint({"a": counted(2), "x.y.mask": counted(3)})
    assert "x.y.mask" in plan_weights(module, checkpoint, rules).render()
    assert "ignored: a constant" in plan_weights(module, checkpoint, rules).render()


def test_rotary_tables_are_ignored_without_a_rule() -> None:
    module = module_of({"a": counted(2)})
    checkpoint = MemoryCheckpoint({"a": counted(2), "layers.0.rotary_emb.inv_freq": counted(3)})
    (ignored,) = plan_weights(module, checkpoint).ignored
    assert (ignored.name, ignored.reason) == (
        "layers.0.rotary_emb.inv_freq",
        "computed from the config",
    )


def test_a_parameter_called_inv_freq_is_filled() -> None:
    module = torch.nn.Module()
    module.rotary_emb = module_of({"inv_freq": counted(2)})
    load_into(module, {"rotary_emb.inv_freq": counted(2)})
    assert torch.equal(module.rotary_emb.inv_freq, counted(2))


def test_dtype_rule_wins_over_everything() -> None:
    module = module_of({"a": counted(2), "b": counted(2)})
    checkpoint = MemoryCheckpoint({"a": counted(2), "b": counted(2)})
    plan = plan_weights(module, checkpoint, WeightMap().dtype("b", torch.float64))
    load_weights(module, plan, checkpoint, dtype=torch.bfloat16)
    assert module.a.dtype == torch.bfloat16
    assert module.b.dtype == torch.float64


def test_maps_are_immutable_and_compose_in_order() -> None:
    first = WeightMap().rename("a", "b")
    second = WeightMap().rename("b", "c")
    assert len(first.rules) == 1
    assert (first + second).describe() == "rename(a -> b)\nrename(b -> c)"
    load({"a": counted(2)}, first + second, {"c": counted(2)})
    with pytest.raises(WeightError, match="nothing takes"):
        load({"a": counted(2)}, second + first, {"c": counted(2)})


def test_unused_rules_are_listed() -> None:
    module = module_of({"a": counted(2)})
    plan = plan_weights(module, MemoryCheckpoint({"a": counted(2)}), WeightMap().rename("x", "y"))
    assert plan.unused_rules == ("rename(x -> y)",)


@pytest.mark.parametrize(
    ("tensors", "rules", "text"),
    [
        (
            {"a": counted(2)},
            WeightMap().fuse("w", ["a", "b"]),
            "missing    b: fuse(w <- a, b) needs it",
        ),
        (
            {"e.0.w": counted(2)},
            WeightMap().stack("w", "e.{e}.w", count=2),
            "missing    e.1.w: stack(w <- 2 x e.{e}.w) needs it",
        ),
        (
            {"a": counted(2, 3), "b": counted(2, 4)},
            WeightMap().fuse("w", ["a", "b"]),
            "[2, 4] torch.float32 does not join a [2, 3]",
        ),
        (
            {"a": counted(5)},
            WeightMap().split("a", ["x", "y"]),
            "does not split into 2 equal parts",
        ),
        (
            {"a": counted(5)},
            WeightMap().split("a", ["x", "y"], [1, 2]),
            "does not split into [1, 2]",
        ),
        ({"a": counted(5)}, WeightMap().split("a", ["x"], dim=3), "dimension 3 of [5]"),
        ({"a": counted(5)}, WeightMap().transpose("a"), "has no two dimensions"),
        ({"a": counted(5)}, WeightMap().reorder("a", (2, -1), (1, 0)), "cannot be seen as [2, -1]"),
        ({"a": counted(2), "b": counted(2)}, WeightMap().rename("a", "b"), "already there"),
        (
            {"a": counted(2), "b": counted(2).int()},
            WeightMap().fuse("w", ["a", "b"]),
            "torch.int32 does not join a",
        ),
    ],
)
def test_what_a_rule_cannot_do_is_a_problem(tensors: Tensors, rules: WeightMap, text: str) -> None:
    with pytest.raises(WeightError) as caught:
        load_into(module_of({"w": counted(2)}), tensors, rules)
    assert text in caught.value.message


@pytest.mark.parametrize(
    "make",
    [
        lambda: WeightMap().rename("a.{i}", "b"),
        lambda: WeightMap().rename("a"),
        lambda: WeightMap().rename("a{", "b"),
        lambda: WeightMap().rename("", "b"),
        lambda: WeightMap().fuse("w.{i}", ["a.{i}", "b"]),
        lambda: WeightMap().fuse("w", []),
        lambda: WeightMap().fuse("w", "ab"),
        lambda: WeightMap().split("w", ["a", "b"], [1, 2, 3]),
        lambda: WeightMap().stack("w", "a.b", 2),
        lambda: WeightMap().stack("w", "a.{e}", 0),
        lambda: WeightMap().reorder("w", (2, 3), (0, 2)),
        lambda: WeightMap().ignore("w", " "),
        lambda: WeightMap().tie("a.{i}", "b"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused_at_once(make: Any) -> None:
    with pytest.raises(UsageError):
        make()


def test_patterns_are_exact() -> None:
    assert Pattern("a.{i}.w").match("a.0.w") == {"i": "0"}
    assert Pattern("a.{i}.w").match("a.0.1.w") is None
    assert Pattern("a.{i}.w").match("xa.0.w") is None
    assert Pattern("a.w").match("aXw") is None
    assert Pattern("{r*}.w").match("a.b.w") == {"r": "a.b"}
    assert Pattern("{i}.{i}").match("1.2") is None


# --- any combination of rules: what is loaded is right, and saving gives the checkpoint back ---


class _Author:
    """Draws rules that fit the tensors, and applies them eagerly with torch as the reference."""

    def __init__(self, data: st.DataObject, tensors: Tensors) -> None:
        self.draw, self.tensors, self.map, self.count = data.draw, dict(tensors), WeightMap(), 0

    def fresh(self) -> str:
        self.count += 1
        return f"new{self.count}"

    def pick(self, fits: Any = lambda tensor: True) -> str | None:
        names = sorted(name for name, tensor in self.tensors.items() if fits(tensor))
        return self.draw(st.sampled_from(names)) if names else None

    def rename(self) -> None:
        name, new = self.pick(), self.fresh()
        assert name is not None
        self.map = self.map.rename(name, new)
        self.tensors[new] = self.tensors.pop(name)

    def split(self) -> None:
        name = self.pick(lambda tensor: max(tensor.shape) > 1)
        if name is None:
            return
        value = self.tensors.pop(name)
        dim = self.draw(st.sampled_from([d for d in range(value.dim()) if value.shape[d] > 1]))
        cut = self.draw(st.integers(1, value.shape[dim] - 1))
        sizes = [cut, value.shape[dim] - cut]
        new = [self.fresh(), self.fresh()]
        self.map = self.map.split(
            name, new, sizes, dim=dim - value.dim() * self.draw(st.integers(0, 1))
        )
        self.tensors.update(zip(new, value.split(sizes, dim), strict=True))

    def fuse(self) -> None:
        name = self.pick()
        assert name is not None
        dim = self.draw(st.integers(0, self.tensors[name].dim() - 1))
        mates = [
            n for n, t in self.tensors.items() if _rest(t, dim) == _rest(self.tensors[name], dim)
        ]
        chosen = self.draw(st.permutations(sorted(mates)))[:3]
        new = self.fresh()
        self.map = self.map.fuse(new, chosen, dim)
        self.tensors[new] = torch.cat([self.tensors.pop(n) for n in chosen], dim)

    def stack(self) -> None:
        name = self.pick(lambda tensor: tensor.dim() < 3)
        if name is None:
            return
        same = sorted(n for n, t in self.tensors.items() if t.shape == self.tensors[name].shape)
        base, new = self.fresh(), self.fresh()
        for index, part in enumerate(same):
            self.map = self.map.rename(part, f"{base}.{index}")
        self.map = self.map.stack(new, base + ".{e}", len(same))
        self.tensors[new] = torch.stack([self.tensors.pop(n) for n in same])

    def transpose(self) -> None:
        name = self.pick(lambda tensor: tensor.dim() > 1)
        if name is not None:
            self.map = self.map.transpose(name)
            self.tensors[name] = self.tensors[name].transpose(-2, -1)

    def reorder(self) -> None:
        name = self.pick(lambda tensor: any(size % 2 == 0 for size in tensor.shape))
        if name is None:
            return
        value = self.tensors[name]
        dim = self.draw(st.sampled_from([d for d in range(value.dim()) if value.shape[d] % 2 == 0]))
        view = self.draw(st.sampled_from([(2, -1), (-1, 2)]))
        self.map = self.map.reorder(name, view, (1, 0), dim=dim)
        sizes = tuple(value.shape[dim] // 2 if size == -1 else size for size in view)
        self.tensors[name] = (
            value.unflatten(dim, sizes).transpose(dim, dim + 1).flatten(dim, dim + 1)
        )

    def ignore(self) -> None:
        if len(self.tensors) > 1:
            name = self.pick()
            assert name is not None
            self.map = self.map.ignore(name, "drawn")
            del self.tensors[name]


def _rest(tensor: torch.Tensor, dim: int) -> tuple[Any, ...]:
    return (tensor.dim(), *(size for axis, size in enumerate(tensor.shape) if axis != dim))


RULES = ["rename", "split", "fuse", "stack", "transpose", "reorder", "ignore"]
SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=3)


@settings(max_examples=120, deadline=None)
@given(
    shapes=st.lists(SHAPES, min_size=1, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
    rules=st.lists(st.sampled_from(RULES), max_size=8),
    data=st.data(),
)
def test_loading_is_right_and_saving_is_its_inverse(
    shapes: list[list[int]], dtype: torch.dtype, rules: list[str], data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(len(shapes))
    tensors = {
        f"t{index}.{'w' * index}": torch.randint(-100, 100, shape, generator=generator).to(dtype)
        for index, shape in enumerate(shapes, 1)
    }
    author = _Author(data, tensors)
    for rule in rules:
        getattr(author, rule)()
    renamed = author.map.rename("{a}.{b}", "{a}_{b}")
    expected = {name.replace(".", "_"): value for name, value in author.tensors.items()}

    checkpoint = MemoryCheckpoint(tensors)
    module = module_of(expected)
    plan = plan_weights(module, checkpoint, renamed)
    load_weights(module, plan, checkpoint, dtype="stored")
    for name, value in expected.items():
        assert torch.equal(module.get_parameter(name), value)
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(module, plan, Path(folder) / "out", checkpoint=checkpoint)
        saved = open_checkpoint(Path(folder) / "out")
        assert set(saved.names()) == set(tensors)
        for name, value in tensors.items():
            assert saved.info(name).dtype == dtype
            assert torch.equal(saved.tensor(name), value)
        again = module_of(expected)  # from a file, whose tensors are read straight into place
        load_weights(again, plan_weights(again, saved, renamed), saved, dtype="stored")
        for name, value in expected.items():
            assert torch.equal(again.get_parameter(name), value)


@given(st.permutations([0, 1, 2]), st.integers(0, 2))
def test_reorder_is_undone_by_the_inverse_permutation(permutation: list[int], dim: int) -> None:
    value = torch.randn(12, 12, 12)
    inverse = tuple(permutation.index(axis) for axis in range(3))
    view = tuple((2, 3, 2)[axis] for axis in permutation)
    there = reorder(value, dim, (2, 3, 2), tuple(permutation))
    assert torch.equal(reorder(there, dim, view, inverse), value)
