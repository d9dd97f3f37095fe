"""Checkpoints, weight maps, and the loader between them and a model.

checkpoint = open_checkpoint(path)                     # headers only
plan = plan_weights(model, checkpoint, weight_map)     # every tensor and parameter accounted for,
or one error load_weights(model, plan, checkpoint, device="cpu")    # streams the values in
"""

from __future__ import annotations

from llmfw.weights.checkpoint import Checkpoint, TensorInfo
from llmfw.weights.loader import LoadReport, load_into, load_weights
from llmfw.weights.memory_reader import MemoryCheckpoint
from llmfw.weights.opening import open_checkpoint
from llmfw.weights.plan import LoadPlan, PlanRow
from llmfw.weights.planning import plan_weights
from llmfw.weights.shards import Shard
from llmfw.weights.sources import ModelSource, resolve_model
from llmfw.weights.weight_map import WeightMap
from llmfw.weights.writer import SaveReport, save_checkpoint

__all__ = [
    "Checkpoint",
    "LoadPlan",
    "LoadReport",
    "MemoryCheckpoint",
    "ModelSource",
    "PlanRow",
    "SaveReport",
    "Shard",
    "TensorInfo",
    "WeightMap",
    "load_into",
    "load_weights",
    "open_checkpoint",
    "plan_weights",
    "resolve_model",
    "save_checkpoint",
]
