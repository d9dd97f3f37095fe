from __future__ import annotations

import json

from llmfw.request import CompletionOutput, FinishReason, RequestOutput, Timings


def test_finish_reasons_are_plain_strings():
    assert FinishReason.STOP == "stop"
    assert f"{FinishReason.LENGTH}" == "length"
    assert json.dumps({"finish_reason": FinishReason.ABORT}) == '{"finish_reason": "abort"}'


def test_timings():
    timings = Timings(arrival=10.0)
    assert timings.time_to_first_token is None
    assert timings.total is None
    timings.first_token, timings.finished = 10.5, 12.0
    assert (timings.time_to_first_token, timings.total) == (0.5, 2.0)


def test_output_text_is_the_first_completion():
    outputs = [CompletionOutput(0, "a"), CompletionOutput(1, "b", finish_reason=FinishReason.STOP)]
    output = RequestOutput("0", "p", [1], outputs, finished=False)
    assert output.text == "a"
    assert [each.finished for each in outputs] == [False, True]
