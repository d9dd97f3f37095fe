"""References of the products that share an RMS norm between two of them.

The product before the norm adds to the residual stream and multiplies by the norm's weight; the
product after it divides its sums by the root mean square, which is the same for all of a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def row_squares(residual: torch.Tensor, squares: torch.Tensor | None = None) -> torch.Tensor:
    """The sum of each row's squares in float32: residual [..., H], squares [..., parts] -> [...].

    squares: Sums of parts of the rows, where a kernel has them already.
    """
    return residual.float().square().sum(-1) if squares is None else squares.sum(-1)


def add_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """residual [T, out] += x [T, in] @ weight [out, in]^T, in place; what `normed_linear` takes.

    Returns:
        residual * (offset + norm_weight) [T, out], rounded once to x's dtype, and the float32
        squares [T, parts], whose sum over the parts is that of the row's residual^2. A kernel may
        give None for these, so that the next product reads the residual.
    """
    residual += F.linear(x, weight)
    scaled = residual.float() * (offset + norm_weight.float())
    return scaled.to(x.dtype), row_squares(residual)[..., None]


def normed_linear(
    x: torch.Tensor,
    residual: torch.Tensor,
    squares: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """linear of rms_norm(residual), whose product with the norm's weight is x: both of add_linear.

    x and residual [T, in], weight [out, in] -> [T, out]. The float32 sums are multiplied by
    1 / sqrt(mean(residual^2) + eps) of their row before the bias is added and the result rounded.
    """
    scale = torch.rsqrt(row_squares(residual, squares) / residual.shape[-1] + eps)
    product = F.linear(x.float(), weight.float()) * scale[..., None]
    return (product if bias is None else product + bias.float()).to(x.dtype)


def normed_gated_linear(
    x: torch.Tensor,
    residual: torch.Tensor,
    squares: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """silu(gate) * up of normed_linear: weight [2I, in] and bias [2I] are gate, then up."""
    gate, up = normed_linear(x, residual, squares, weight, bias, eps).chunk(2, dim=-1)
    return F.silu(gate) * up
