"""Trying a recognition out: does the checkpoint fill the model, and are the logits right?"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmfw_cli.new import source
from llmfw_cli.new.recognise import Recognition, recognise_shapes
from llmfw_cli.new.rules import weight_rules
from llmfw_cli.new.shrink import names_of, shrink

if TYPE_CHECKING:
    import torch

    from llmfw.models import DecoderSpec, PretrainedModel
    from llmfw.weights import Checkpoint, LoadPlan, WeightMap


def spec_of(found: Recognition, config: Any) -> DecoderSpec:
    """The decoder that the written expressions describe."""
    import llmfw

    names = {name: getattr(llmfw, name) for name in ("MLAParams", "MoEParams", "RopeParams")}
    switches = {
        name: eval(text, {**names, "config": config}) for name, text in found.switches.items()
    }
    return llmfw.DecoderSpec.from_config(config, **switches)


def weight_map_of(found: Recognition, config: Any) -> WeightMap:
    """The weight map that the written rules make."""
    import llmfw

    rules = source.chain(weight_rules(found)) or "WeightMap()"
    made: WeightMap = eval(rules, {"config": config, "WeightMap": llmfw.WeightMap})
    return made


def build_model(found: Recognition, config: Any) -> PretrainedModel[Any]:
    """The model on the meta device."""
    from llmfw import ModelConfig, StockDecoderForCausalLM, hookimpl
    from llmfw.models import build
    from llmfw.models.build import CoreDefaults
    from llmfw.plugins import PluginHost

    class Trial:
        @hookimpl
        def llmfw_model(self, model_config: ModelConfig[Any]) -> PretrainedModel[Any]:
            return StockDecoderForCausalLM(model_config, spec_of(found, config))

    host = PluginHost(Trial(), name="llmfw new", defaults=CoreDefaults())
    return build(ModelConfig(pretrained_config=config, max_model_len=128, block_size=16), host)


def plan(found: Recognition, checkpoint: Checkpoint) -> LoadPlan:
    """The plan of loading the checkpoint.

    Raises:
        WeightError: With all that does not fit.
    """
    from llmfw.weights import plan_weights

    return plan_weights(
        build_model(found, found.config), checkpoint, weight_map_of(found, found.config)
    )


class Reference:
    """transformers' own tiny random model of the same kind, and what it answers.

    Args:
        found: The recognition whose configuration is shrunk.
    """

    PROMPT = (3, 17, 92, 5, 41, 41, 8, 120, 66, 2, 77, 19, 101, 54, 30, 9, 88, 23, 61, 14)

    def __init__(self, found: Recognition) -> None:
        import torch
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM

        from llmfw.weights import open_checkpoint

        raw = shrink(found.raw, names_of(found.config))
        self.config = CONFIG_MAPPING[found.raw["model_type"]].from_dict(raw)
        self.config.architectures = [found.architecture]
        self.raw = raw
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.15)
                self.logits = model(torch.tensor([self.PROMPT])).logits[0]
        with tempfile.TemporaryDirectory() as folder:  # its names are then a checkpoint's
            model.save_pretrained(folder)
            checkpoint = open_checkpoint(Path(folder))
            self.tensors = {name: checkpoint.tensor(name).clone() for name in checkpoint.names()}

    def recognised(self) -> Recognition:
        """The tiny model's own recognition."""
        shapes = {name: tuple(value.shape) for name, value in self.tensors.items()}
        return recognise_shapes(self.raw, self.config, self.config.architectures[0], shapes)

    def distance(self, changes: Mapping[str, Any]) -> float:
        """The greatest difference of logits, with changes to the recognition; inf if it fails."""
        tiny = self.recognised()
        switches = {**tiny.switches, **changes.get("switches", {})}
        switches = {name: text for name, text in switches.items() if text}
        tiny = replace(tiny, switches=switches, qkv_order=changes.get("qkv_order", tiny.qkv_order))
        return float((self._answer(tiny) - self.logits).abs().max())

    def _answer(self, tiny: Recognition) -> torch.Tensor:
        from llmfw.testing import PackedSession
        from llmfw.weights import load_into

        model = build_model(tiny, self.config)
        load_into(model, self.tensors, weight_map_of(tiny, self.config))
        return PackedSession(model).step({"a": self.PROMPT})["a"]
