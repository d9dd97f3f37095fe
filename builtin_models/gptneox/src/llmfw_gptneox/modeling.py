"""GPT-NeoX (arXiv:2204.06745) and Pythia (arXiv:2304.01373).

Layer norms, biases, partial rotary embedding and a plain MLP that runs beside attention, each with
its own norm, or with `use_parallel_residual` off after it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmfw import DecoderSpec, ModelConfig, StockDecoderForCausalLM

if TYPE_CHECKING:
    from transformers import GPTNeoXConfig


class GPTNeoXForCausalLM(StockDecoderForCausalLM):
    """The stock decoder with GPT-NeoX's switches.

    Args:
        model_config: The model's configuration.
    """

    def __init__(self, model_config: ModelConfig[GPTNeoXConfig]) -> None:
        config = model_config.pretrained_config
        spec = DecoderSpec.from_config(
            config,
            mlp_bias=True,
            gated=False,
            block="parallel_norms" if config.use_parallel_residual else "sequential",
        )
        super().__init__(model_config, spec)
