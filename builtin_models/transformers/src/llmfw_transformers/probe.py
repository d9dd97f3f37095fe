"""A dry run on the meta device: what a model asks of attention and of its cache.

A model is judged by what it does, not by its name. It runs once over a few tokens that hold no
values, with an attention function that takes notes, a mask that says which keys it lets through,
and a cache that only takes keys and values: whoever asks it for more keeps other state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

PROBE = "llmfw_probe"
"""The name under which the note-taking attention is known to transformers."""

TOKENS = 8
HORIZON = 1 << 18  # windows are looked for up to this many keys
_HARMLESS = frozenset(("dropout", "position_ids", "use_cache", "is_causal", "logits_to_keep"))
_KNOWN = frozenset(("scaling", "sliding_window", "softcap", "s_aux"))


class Unservable(Exception):
    """Why a model cannot be served; the message ends a sentence. It never leaves the plugin."""


@dataclass(frozen=True)
class AttentionCall:
    """What one module asks of attention.

    Args:
        num_heads, num_kv_heads: Heads of queries, and of keys and values.
        head_dim, v_head_dim: Features of a head of queries and keys, and of values.
        window: How many of the last keys a query sees; None for all.
        has_softcap, has_sinks: Whether scores are capped, and heads have an extra logit.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    window: int | None
    has_softcap: bool
    has_sinks: bool


@dataclass
class Findings:
    """What the dry run found.

    Args:
        calls: Each module that attends, by its path, in the order of the calls.
        inputs: Each linear layer's input, by its path; one object for those that share it.
    """

    calls: dict[str, AttentionCall] = field(default_factory=dict)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Visible:
    """Which keys a mask lets through: the last `window`, or all; or why that cannot be said."""

    window: int | None = None
    refusal: str = ""


def probe(model: Any) -> Findings:
    """Run a model that was built for `PROBE` on the meta device.

    Raises:
        Unservable: If it does what packed inputs over a paged cache cannot do.
    """
    findings = Findings()
    paths = {module: path for path, module in model.named_modules()}
    handles = []
    for module, path in paths.items():
        module._llmfw_note = _note_of(findings, path)
        if type(module) is nn.Linear:
            handles.append(module.register_forward_pre_hook(_input_note(findings, path)))
    tokens = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    positions = torch.arange(TOKENS, device="meta")[None]
    try:
        with torch.no_grad():
            model(
                input_ids=tokens,
                position_ids=positions,
                past_key_values=KeysAndValuesOnly(),
                use_cache=True,
            )
    except Unservable:
        raise
    except Exception as exc:
        raise Unservable(f"it fails in a dry run: {type(exc).__name__}: {exc}") from exc
    finally:
        for handle in handles:
            handle.remove()
        for module in paths:
            del module._llmfw_note
    if not findings.calls:
        raise Unservable("its attention does not go through transformers' attention interface")
    return findings


class KeysAndValuesOnly:
    """A cache that keeps nothing and knows keys and values only."""

    is_compileable = False
    is_initialized = True
    is_sliding = (False,) * 1024  # of each layer

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of this step alone."""
        return key, value

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        """Nothing is kept."""
        return 0

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """As many keys as queries, from the first one on."""
        return query_length, 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise Unservable(f"it keeps state that is not keys and values (it asks for {name})")


def _note_of(findings: Findings, path: str) -> Callable[..., None]:
    def note(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        options: dict[str, Any],
    ) -> None:
        if path in findings.calls:
            raise Unservable(f"{path} attends more than once for a token")
        visible = getattr(mask, "llmfw_visible", None)
        if visible is None:
            what = "no causal mask" if mask is None else "a mask of its own"
            raise Unservable(f"{path} attends with {what}")
        if visible.refusal:
            raise Unservable(f"{path} attends with a mask that is {visible.refusal}")
        for name, option in options.items():
            if option is not None and option is not False and name not in _KNOWN | _HARMLESS:
                raise Unservable(f"{path} gives attention {name!r}, which it does not know")
        shapes = query.shape, key.shape, value.shape
        if any(len(shape) != 4 or shape[2] != TOKENS for shape in shapes):
            raise Unservable(f"{path} attends over {[list(shape) for shape in shapes]}")
        findings.calls[path] = AttentionCall(
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            head_dim=query.shape[3],
            v_head_dim=value.shape[3],
            window=visible.window,
            has_softcap=options.get("softcap") is not None,
            has_sinks=options.get("s_aux") is not None,
        )

    return note


def _input_note(findings: Findings, path: str) -> Callable[..., None]:
    def note(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        findings.inputs[path] = args[0]

    return note


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    module._llmfw_note(query, key, value, attention_mask, options)
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3]), None


def _mask(*, q_length: int, kv_length: int, mask_function: Any, **_: Any) -> torch.Tensor:
    mask = torch.empty(1, 1, q_length, kv_length, dtype=torch.bool, device="meta")
    mask.llmfw_visible = visible_keys(mask_function)  # type: ignore[attr-defined]
    return mask


def visible_keys(mask_function: Any) -> Visible:
    """Which keys a mask function of transformers lets through, tried at some rows.

    Args:
        mask_function: Called with the indices of batch, head, query and key; true where seen.
    """
    with torch.device("cpu"):
        keys = torch.arange(HORIZON)
        zero = torch.tensor(0)
        last = HORIZON - 1
        try:
            seen = _row(mask_function, zero, last, keys)
            window = int(seen.sum())
            rows = {0, 1, 2, 5, 100, window - 1, min(window, last), last // 3, last // 2, last}
            for query in sorted(rows):
                wanted = (keys <= query) & (keys > query - window)
                if not torch.equal(_row(mask_function, zero, query, keys), wanted):
                    return Visible(refusal="neither causal nor a sliding window")
        except Exception as exc:
            return Visible(refusal=f"not a function of indices ({exc})")
    return Visible(window=None if window == HORIZON else window)


def _row(mask_function: Any, zero: torch.Tensor, query: int, keys: torch.Tensor) -> torch.Tensor:
    seen = mask_function(zero, zero, torch.tensor(query), keys)
    return torch.as_tensor(seen).expand_as(keys).bool()


AttentionInterface.register(PROBE, _attention)
AttentionMaskInterface.register(PROBE, _mask)
