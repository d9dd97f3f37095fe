"""The fallback held to the model contract, on architectures that no plugin here owns."""

from __future__ import annotations

from llmfw.testing import ModelContract


class TestOlmo2(ModelContract):
    """Norms over all heads and behind each branch."""

    architecture = "Olmo2ForCausalLM"


class TestGraniteMoe(ModelContract):
    """Experts that transformers stacks from the checkpoint, scaled residuals and logits."""

    architecture = "GraniteMoeForCausalLM"
