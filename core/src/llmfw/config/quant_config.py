"""How weights are quantised, and which modules are left alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class QuantConfig:
    """Quantisation of a model; the default leaves every weight in the model's dtype.

    quant_algo: name of a scheme of `llmfw.quantization`, None for none.
    exclude_modules: checkpoint-side module names with `*` wildcards that stay unquantised.
    """

    quant_algo: str | None = None
    group_size: int | None = None
    exclude_modules: tuple[str, ...] = ()
