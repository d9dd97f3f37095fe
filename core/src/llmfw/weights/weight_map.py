"""`WeightMap`: a table from a checkpoint's tensor names to a model's parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from llmfw.errors import UsageError
from llmfw.weights.patterns import Pattern
from llmfw.weights.rules import (
    DtypeRule,
    Fuse,
    IgnoreRule,
    Rename,
    ReorderRule,
    Rule,
    Split,
    StackRule,
    TieRule,
    TransposeRule,
)


@dataclass(frozen=True)
class WeightMap:
    """Ordered rules that turn a checkpoint's names and layouts into the model's.

    A map starts from the checkpoint's names; each rule works on what the one before it left; what
    comes out must be the model's logical names: the names in the module tree, with declared shards
    (`q_proj`, `k_proj`, `v_proj` for a fused `qkv_proj`) under their own names. A checkpoint with
    HF decoder names needs no rule at all.

    Names are exact; `{i}` stands for one dotted segment and `{rest*}` for several. A map is
    immutable: every method returns a longer one, and `a + b` is a's rules and then b's.

        WeightMap().rename("transformer.wte.weight",
        "model.embed_tokens.weight").transpose("h.{i}.mlp.weight")
    """

    rules: tuple[Rule, ...] = ()

    def __add__(self, other: WeightMap) -> WeightMap:
        return WeightMap(self.rules + other.rules)

    def _with(self, rule: Rule) -> WeightMap:
        return WeightMap((*self.rules, rule))

    def rename(self, src: str | Mapping[str, str], dst: str | None = None) -> WeightMap:
        """Another name for a tensor; a mapping of many is one rule a line, in its order."""
        if isinstance(src, str):
            if dst is None:
                raise UsageError(f"rename('{src}') needs the new name", hint="rename(src, dst)")
            return self._with(Rename(Pattern(src), Pattern(dst)))
        rules = tuple(Rename(Pattern(old), Pattern(new)) for old, new in src.items())
        return WeightMap(self.rules + rules)

    def fuse(self, dst: str, srcs: Sequence[str], dim: int = 0) -> WeightMap:
        """Tensors `srcs`, one after the other along `dim`, become `dst`."""
        _require(len(srcs) > 0 and not isinstance(srcs, str), "fuse needs a list of names")
        return self._with(Fuse(Pattern(dst), tuple(map(Pattern, srcs)), dim))

    def split(
        self, src: str, dsts: Sequence[str], sizes: Sequence[int] | None = None, dim: int = 0
    ) -> WeightMap:
        """Tensor `src`, cut along `dim` (equally, unless `sizes` are given), becomes `dsts`."""
        _require(len(dsts) > 0 and not isinstance(dsts, str), "split needs a list of names")
        cut = None if sizes is None else tuple(sizes)
        return self._with(Split(Pattern(src), tuple(map(Pattern, dsts)), cut, dim))

    def stack(self, dst: str, src: str, count: int) -> WeightMap:
        """`count` tensors, numbered from 0 by the placeholder that only `src` has, become `dst`."""
        target, source = Pattern(dst), Pattern(src)
        over = [name for name in source.fields if name not in target.fields]
        extra = [name for name in target.fields if name not in source.fields]
        _require(
            len(over) == 1 and not extra and count > 0,
            f"stack: '{src}' needs exactly one placeholder that '{dst}' lacks, and a count above 0",
        )
        return self._with(StackRule(target, source, count, over[0]))

    def stack_experts(
        self,
        dst: str,
        src: str,
        count: int,
        gate: str = "gate_proj",
        up: str = "up_proj",
        down: str = "down_proj",
    ) -> WeightMap:
        """A layer's numbered experts become the stacked weights of a stock `Experts` at `dst`.

        Their biases, too, where there are.

        Experts that are stacked already load, too: `dst` with gate_proj.weight, up_proj.weight and
        down_proj.weight as in GGUF files, or with `Experts`' own names.

        Args:
            dst: Path of the `Experts`, e.g. "model.layers.{i}.mlp.experts".
            src: Path of one expert, e.g. "model.layers.{i}.mlp.experts.{e}".
            count: How many there are.
            gate: Name of the linear layer inside the activation.
            up: Name of the one that it is multiplied with.
            down: Name of the last one.
        """
        names = {"gate_proj": gate, "up_proj": up, "down_proj": down}
        stacked = self
        for ending, kind in (("", "weight"), ("_bias", "bias")):
            for ours, theirs in names.items():
                stacked = stacked.rename(f"{dst}.{ours}.{kind}", f"{dst}.{ours}{ending}")
                stacked = stacked.stack(f"{dst}.{ours}{ending}", f"{src}.{theirs}.{kind}", count)
            parts = [f"{dst}.gate_proj{ending}", f"{dst}.up_proj{ending}"]
            stacked = stacked.fuse(f"{dst}.gate_up_proj{ending}", parts, dim=1)
        return stacked

    def transpose(self, pattern: str) -> WeightMap:
        """The last two dimensions exchanged."""
        return self._with(TransposeRule(Pattern(pattern)))

    def reorder(
        self, pattern: str, view_shape: Sequence[int], permutation: Sequence[int], dim: int = 0
    ) -> WeightMap:
        """Dimension `dim` seen as `view_shape` (one may be -1), permuted, and merged again.

        Rows stored as [heads, 3, head_dim] become [3, heads, head_dim] by `(heads, 3, head_dim),
        (1, 0, 2)`.
        """
        return self._with(ReorderRule(Pattern(pattern), tuple(view_shape), tuple(permutation), dim))

    def tie(self, dst: str, src: str) -> WeightMap:
        """Parameter `dst` is the same object as `src`; a tensor for `dst` is ignored as "tied"."""
        return self._with(TieRule(Pattern(dst), Pattern(src)))

    def ignore(self, pattern: str, reason: str) -> WeightMap:
        """Tensors that nothing takes; the reason is shown by `llmfw inspect --weights`."""
        _require(bool(reason.strip()), f"ignore('{pattern}') needs a reason")
        return self._with(IgnoreRule(Pattern(pattern), reason))

    def dtype(self, pattern: str, dtype: torch.dtype) -> WeightMap:
        """Parameters (the model's names) that keep this dtype whatever the rest is loaded as."""
        return self._with(DtypeRule(Pattern(pattern), dtype))

    def describe(self) -> str:
        """The rules, one a line."""
        return "\n".join(rule.describe() for rule in self.rules)


IGNORED_BY_DEFAULT = (
    IgnoreRule(Pattern("{path*}.rotary_emb.inv_freq"), "computed from the config"),
    IgnoreRule(Pattern("rotary_emb.inv_freq"), "computed from the config"),
)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)
