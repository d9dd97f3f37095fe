{% if cookiecutter.__weights %}
"""From the checkpoint's names to the module tree's."""
{% else %}
"""The checkpoint's names are the module tree's; q/k/v and gate/up fuse as the modules say."""
{% endif %}

from __future__ import annotations

{% if 'config.' in cookiecutter.__weights %}
from typing import Any

from llmfw import WeightMap


def weight_map(config: Any) -> WeightMap:
    """The table for a model of this configuration's sizes."""
    return {{ cookiecutter.__weights }}
{% else %}
from llmfw import WeightMap

WEIGHTS = {{ cookiecutter.__weights or 'WeightMap()' }}
{% endif %}
