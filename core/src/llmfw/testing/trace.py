"""Recording activations: what goes into and comes out of every module, ours and the reference's.

A recording maps "path|stage" to float32 [tokens, features]. Stages: "input" and "output" of each
module, and inside attention "q" (rotated, times its scale), "k" (rotated), "v" and "context"
(before the output projection).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from llmfw.layers import Attention
from llmfw.models import DecoderLayer
from llmfw.testing.packed import PackedSession

Recording = dict[str, torch.Tensor]


def key_of(path: str, stage: str) -> str:
    """The key of a module's stage."""
    return f"{path}|{stage}"


def record_ours(
    model: nn.Module, steps: Sequence[Mapping[str, Sequence[int]]], name: str
) -> tuple[Recording, torch.Tensor]:
    """Run steps of a packed batch; record the last one, of one request.

    Args:
        model: Ours, loaded.
        steps: New tokens by request, as `PackedSession.step` takes them.
        name: The request that is recorded.

    Returns:
        The recording and the logits of that request's tokens in the last step.
    """
    total = sum(len(ids) for step in steps for ids in step.values())
    blocks = total + len(steps[-1]) + 8
    session = PackedSession(model, num_blocks=blocks)  # type: ignore[arg-type]
    for step in steps[:-1]:
        session.step(step)
    last = steps[-1]
    order = sorted(last, key=lambda each: len(last[each]) == 1)
    start = sum(len(last[each]) for each in order[: order.index(name)])
    rows = slice(start, start + len(last[name]))
    recording: Recording = {}

    def put(path: str, stage: str, value: torch.Tensor) -> None:
        if value.ndim > 1 and value.shape[0] == sum(map(len, last.values())):
            recording.setdefault(key_of(path, stage), _kept(value[rows]))

    with ExitStack() as stack:
        for path, module in model.named_modules():
            stack.enter_context(_module_hooks(path, module, put))
            if isinstance(module, Attention):
                stack.enter_context(_attention_hooks(path, module, put))
        logits = session.step(last)[name]
    return recording, logits.float().cpu()


def record_reference(model: nn.Module, ids: Sequence[int]) -> tuple[Recording, torch.Tensor]:
    """Run one prompt through the reference; returns the recording and all logits."""
    from llmfw.testing.compare import reference_logits

    recording: Recording = {}
    count = len(ids)

    def put(path: str, stage: str, value: torch.Tensor) -> None:
        if value.ndim > 2 and value.shape[0] == 1 and value.shape[1] == count:
            value = value[0]
        if value.ndim > 1 and value.shape[0] == count:
            recording.setdefault(key_of(path, stage), _kept(value))

    with ExitStack() as stack:
        for path, module in model.named_modules():
            stack.enter_context(_module_hooks(path, module, put))
        stack.enter_context(_their_attention(model, put))
        logits = reference_logits(model, ids)
    return recording, logits


Put = Callable[[str, str, torch.Tensor], None]


def _kept(value: torch.Tensor) -> torch.Tensor:
    """A copy: kernels may write into their inputs, and the batch's memory is used again."""
    return value.detach().flatten(1).float().cpu().clone()


@contextmanager
def _module_hooks(path: str, module: nn.Module, put: Put) -> Iterator[None]:
    try:
        signature = inspect.signature(module.forward)
    except (TypeError, ValueError):
        signature = inspect.Signature()
    is_layer = isinstance(module, DecoderLayer)
    # A norm adds its residual before it starts, an attention or MLP to what it gives: then neither
    # sum is in its counterpart, which has no residual, and only the input can be compared.
    adds_later = not is_layer and next(module.children(), None) is not None
    added_later = False

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal added_later
        value, residual = _stream_in(signature, args, kwargs)
        added_later = adds_later and residual is not None
        if value is not None and residual is not None and not adds_later:
            value = value + residual
        if value is not None:
            put(path, "input", value)

    def after(_: nn.Module, args: Any, output: Any) -> None:
        value = _stream_out(output, is_layer)
        if value is not None and not added_later:
            put(path, "output", value)

    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _stream_in(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The first floating-point argument, and a `residual` of its shape that stands apart."""
    try:
        arguments = dict(signature.bind(*args, **kwargs).arguments)
    except TypeError:
        arguments = dict(enumerate(args))  # type: ignore[arg-type]
    residual = arguments.pop("residual", None)
    arguments.update(arguments.pop("kwargs", {}) if "kwargs" in arguments else {})
    for value in arguments.values():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            apart = isinstance(residual, torch.Tensor) and residual.shape == value.shape
            return value, residual if apart else None
    return None, None


def _stream_out(output: Any, is_layer: bool) -> torch.Tensor | None:
    """The tensor that a module returns; of a layer's (hidden, residual) the sum."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor):
        both = is_layer and len(output) == 2 and isinstance(output[1], torch.Tensor)
        return output[0] + output[1] if both else output[0]
    for name in ("last_hidden_state", "logits"):
        value = getattr(output, name, None)
        if isinstance(value, torch.Tensor):
            return value
    return None


@contextmanager
def _attention_hooks(path: str, module: Attention, put: Put) -> Iterator[None]:
    """Wrap the two attention ops of one of our layers."""
    rope_and_cache, paged_attention = module._rope_and_cache, module._paged_attention

    def rotated(qkv: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        q = rope_and_cache(qkv, *rest, **more)
        positions, _, k_cache, v_cache, slots = rest[:5]
        put(path, "q", q * module.scale)
        for stage, cache in (("k", k_cache), ("v", v_cache)):
            put(path, stage, cache.view(-1, *cache.shape[2:])[slots][: len(positions)])
        return q

    def attended(*args: Any, **more: Any) -> torch.Tensor:
        out = paged_attention(*args, **more)
        put(path, "context", out)
        return out

    module._rope_and_cache, module._paged_attention = rotated, attended
    try:
        yield
    finally:
        module._rope_and_cache, module._paged_attention = rope_and_cache, paged_attention


@contextmanager
def _their_attention(model: nn.Module, put: Put) -> Iterator[None]:
    """Wrap the attention function that transformers' modules look up by name."""
    config = getattr(model, "config", None)
    kind = getattr(config, "_attn_implementation", None)
    if kind is None:
        yield
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    paths = {id(module): path for path, module in model.named_modules()}
    original = ALL_ATTENTION_FUNCTIONS.get(kind)

    def attend(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        run = original or sys.modules[type(module).__module__].eager_attention_forward
        scale = kwargs.get("scaling")
        path = paths.get(id(module))
        output = run(module, query, key, value, *args, **kwargs)
        if path is not None:
            put(path, "q", query.transpose(1, 2) * (scale or query.shape[-1] ** -0.5))
            put(path, "k", key.transpose(1, 2))
            put(path, "v", value.transpose(1, 2))
            put(path, "context", output[0].reshape(*output[0].shape[:2], -1))
        return output

    local = ALL_ATTENTION_FUNCTIONS._local_mapping
    before = local.get(kind)
    local[kind] = attend
    try:
        yield
    finally:
        if before is None:
            del local[kind]
        else:
            local[kind] = before
