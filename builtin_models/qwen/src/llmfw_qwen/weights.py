"""The checkpoint's names are the module tree's; q/k/v and gate/up fuse as the modules say."""

from __future__ import annotations

from llmfw import WeightMap

WEIGHTS = WeightMap()
