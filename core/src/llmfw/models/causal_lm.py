"""A decoder with a language-model head: what the engine runs."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import torch
from torch import nn

from llmfw.attention.metadata import AttentionMetadata
from llmfw.config import ModelConfig, TConfig, text_config
from llmfw.layers.embedding import Embedding, LMHead
from llmfw.models.decoder import DecoderModel, StockDecoderModel
from llmfw.models.pretrained import PretrainedModel
from llmfw.models.spec import DecoderSpec

TModel = TypeVar("TModel", bound=nn.Module)


class DecoderModelForCausalLM(PretrainedModel[TConfig], Generic[TModel, TConfig]):
    """A decoder and its head, in the shape of TensorRT-LLM's guide.

    Args:
        model: The decoder; its `embed_tokens` is what a tied head shares.
        config: The model's configuration.
        hidden_size: Width of the hidden states.
        vocab_size: Size of the vocabulary.
        lm_head_bias: Whether the head has a bias.
        tied: Whether the head shares the embedding; the configuration's tie_word_embeddings when
            left out.
        logit_scale: Factor of the logits.
        logit_softcap: Logits become logit_softcap * tanh(logits / logit_softcap).
    """

    def __init__(
        self,
        model: TModel,
        *,
        config: ModelConfig[TConfig],
        hidden_size: int,
        vocab_size: int,
        lm_head_bias: bool = False,
        tied: bool | None = None,
        logit_scale: float | None = None,
        logit_softcap: float | None = None,
    ) -> None:
        super().__init__(config)
        self.model = model
        self.vocab_size = vocab_size
        self.logit_scale = logit_scale
        self.logit_softcap = logit_softcap
        self.lm_head = config.make(
            "lm_head",
            "lm_head",
            num_embeddings=vocab_size,
            embedding_dim=hidden_size,
            bias=lm_head_bias,
        )
        if tied is None:
            tied = bool(
                getattr(text_config(config.pretrained_config), "tie_word_embeddings", False)
            )
        embedding = getattr(model, "embed_tokens", None)
        if tied and isinstance(self.lm_head, LMHead) and isinstance(embedding, Embedding):
            self.lm_head.tie_weights(embedding)

    def forward(
        self,
        attn_metadata: AttentionMetadata,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        return_context_logits: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Logits of the packed batch.

        Args:
            attn_metadata: The batch and the cache.
            input_ids: int64 [tokens].
            position_ids: int64 [tokens]; attn_metadata's when left out.
            inputs_embeds: [tokens, hidden_size] in place of input_ids.
            return_context_logits: Logits of every token instead of the wanted rows.
            **kwargs: Passed down to every layer.

        Returns:
            [rows, vocab_size]: the rows of attn_metadata.logits_indices, all tokens when that is
                None.
        """
        hidden = self.model(
            attn_metadata=attn_metadata,
            input_ids=input_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        rows = None if return_context_logits else attn_metadata.logits_indices
        return self.compute_logits(hidden if rows is None else hidden[rows])

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states [rows, hidden_size] -> logits [rows, vocab_size]."""
        logits = self.lm_head(hidden_states)
        if self.logit_scale is not None:
            logits = logits * self.logit_scale
        if self.logit_softcap is not None:
            logits = self.logit_softcap * torch.tanh(logits / self.logit_softcap)
        return logits  # type: ignore[no-any-return]


class StockDecoderForCausalLM(DecoderModelForCausalLM[DecoderModel[Any], Any]):
    """The model that a `DecoderSpec` describes.

    Args:
        model_config: The model's configuration.
        spec: The description; derived from the configuration when left out.
    """

    def __init__(self, model_config: ModelConfig[Any], spec: DecoderSpec | None = None) -> None:
        spec = spec or DecoderSpec.from_config(model_config.pretrained_config)
        super().__init__(
            StockDecoderModel(model_config, spec),
            config=model_config,
            hidden_size=spec.hidden_size,
            vocab_size=spec.vocab_size,
            lm_head_bias=spec.lm_head_bias,
            tied=spec.tied,
            logit_scale=spec.logit_scale,
            logit_softcap=spec.logit_softcap,
        )
        self.spec = spec
