from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from engine_models import CPU
from llmfw import CausalConv1d, ModelConfig, StateSpec
from llmfw.attention.state import StateCache
from llmfw.models import bind_tree
from llmfw.models.weights import materialize
from recurrent_batches import SLOTS, batch

CHANNELS, TAPS = 6, 4


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("act", ["silu", "gelu", None])
def test_it_is_torchs_convolution_of_each_request(act: str | None, bias: bool):
    layer = CausalConv1d(CHANNELS, TAPS, bias=bias, act=act)
    bind_tree(layer, ModelConfig(pretrained_config=None, dtype=torch.float32))
    materialize(layer, CPU)
    torch.manual_seed(0)
    for parameter in layer.parameters():
        parameter.data.normal_()
    assert sorted(dict(layer.named_parameters())) == ["bias", "weight"][not bias :]
    cache = StateCache({0: StateSpec(layer.state_tensors(torch.float32))}, SLOTS, CPU)
    metadata = replace(batch("mixed"), states=cache.layers)
    first, second = (torch.randn(sum(metadata.query_lens), CHANNELS) for _ in range(2))
    state = metadata.states[0]
    got = [layer(part, state, metadata) for part in (first, second)]
    shape = {"silu": F.silu, "gelu": F.gelu, None: lambda x: x}[act]
    lens = metadata.query_lens
    for one, two, *outs in zip(*(part.split(lens) for part in (first, second, *got)), strict=True):
        padded = F.pad(torch.cat((one, two)).t(), (TAPS - 1, 0))
        want = shape(F.conv1d(padded[None], layer.weight, layer.bias, groups=CHANNELS))[0].t()
        torch.testing.assert_close(torch.cat(outs), want, atol=1e-5, rtol=1e-5)


def test_it_keeps_the_inputs_of_the_next_token_in_the_models_dtype():
    layer = CausalConv1d(CHANNELS, TAPS)
    (tensor,) = layer.state_tensors(torch.bfloat16).values()
    assert (tensor.shape, tensor.dtype) == ((TAPS - 1, CHANNELS), torch.bfloat16)
    bind_tree(layer, ModelConfig(pretrained_config=None, dtype=torch.bfloat16))
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}
    assert "6, kernel_size=4, bias=True" in repr(layer)
