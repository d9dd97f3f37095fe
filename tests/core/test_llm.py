from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import llmfw.llm
from engine_models import HistoryModel, TinyAttentionModel
from llmfw import LLM, SamplingParams
from llmfw.errors import EngineError, RequestError, TokenizerError, UsageError
from tiny_tokenizer import write_tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture
def model():
    return HistoryModel()


@pytest.fixture
def make(tmp_path, monkeypatch, model):
    """A factory of LLMs around the test model; `make.asked` keeps what load_model was asked."""
    made = []
    write_tokenizer(tmp_path)
    generation_config: dict[str, object] = {}
    asked: dict[str, object] = {}

    def load_model(name, **settings):
        asked.clear()
        asked.update(settings, model=name)
        pretrained = SimpleNamespace(eos_token_id=[96])
        return SimpleNamespace(
            model=model,
            model_config=SimpleNamespace(
                pretrained_config=pretrained,
                device=torch.device("cpu"),
                attn_backend="auto",
                max_model_len=settings["max_model_len"] or 256,
            ),
            source=SimpleNamespace(model_dir=tmp_path),
            generation_config=generation_config,
            engine=None,
        )

    monkeypatch.setattr(llmfw.llm, "load_model", load_model)

    def build(**settings):
        generation_config.update(settings.pop("config", {}))
        llm = LLM("somewhere", block_size=4, **settings)
        made.append(llm)
        return llm

    build.asked = asked
    yield build
    for llm in made:
        llm.shutdown()


def test_generate_one_and_many(make, model):
    llm = make()
    one = llm.generate("Hello", GREEDY)
    ids = llm.tokenizer.encode("Hello")
    assert one.prompt == "Hello"
    assert one.prompt_token_ids == ids
    assert one.outputs[0].token_ids == model.expected(ids, 8)
    assert one.text == llm.tokenizer.decode(one.outputs[0].token_ids)
    many = llm.generate(["Hello", ids, {"prompt": "Hello"}, {"prompt_token_ids": ids}], GREEDY)
    assert [output.text for output in many] == [one.text] * 4
    assert llm.generate([], GREEDY) == []
    assert llm.generate(ids, GREEDY).text == one.text


@pytest.mark.parametrize(
    "kind", [tuple, np.array, torch.tensor, lambda ids: [np.int32(i) for i in ids]]
)
def test_kinds_of_token_ids(make, kind):
    llm = make()
    assert llm.generate(kind([1, 2, 3]), GREEDY).prompt_token_ids == [1, 2, 3]
    assert llm.generate([kind([1, 2, 3])], GREEDY)[0].prompt_token_ids == [1, 2, 3]


def test_parameters_for_all_for_each_and_wrong_ones(make):
    llm = make()
    each = [GREEDY, GREEDY.replace(max_tokens=2)]
    lengths = [len(output.outputs[0].token_ids) for output in llm.generate(["a", "b"], each)]
    assert lengths == [8, 2]
    with pytest.raises(UsageError, match="2 sampling_params for 3 prompts"):
        llm.generate(["a", "b", "c"], each)
    with pytest.raises(UsageError, match="sampling_params is a dict"):
        llm.generate("a", {"temperature": 0})


BAD_PROMPTS = {
    "empty": ("", "the prompt is empty"),
    "empty ids": ({"prompt_token_ids": []}, "the prompt is empty"),
    "too long": ("a" * 300, "the prompt has 300 tokens"),
    "out of range": ([[1, 97]], "token id 97 in prompt_token_ids is out of range"),
    "negative": ([[-1]], "token id -1"),
    "fractions": ([[1.5]], "1.5 is not a token id"),
    "switches": ([[True]], "True is not a token id"),
    "words": ({"prompt_token_ids": ["a", "b"]}, "'a' is not a token id"),
    "bytes": ([b"abc"], "a prompt is a bytes"),
    "number": ([5, "a"], "a prompt is a int"),
    "none": ([None, "a"], "a prompt is a NoneType"),
    "mapping": ({"text": "a"}, "the keys"),
    "half a character": ("a\ud800", "no valid text"),
}


@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_bad_prompts_fail_alone(make, case):
    llm = make()
    prompt, text = BAD_PROMPTS[case]
    if isinstance(prompt, list):
        prompt = prompt[0]
    if case not in ("number", "none", "bytes"):
        with pytest.raises(RequestError, match=text) as caught:
            llm.generate(prompt, GREEDY)
        assert caught.value.hint
    good, bad, other = llm.generate(["a", prompt, "b"], GREEDY)
    assert bad.finished
    assert bad.outputs[0].finish_reason == "error"
    assert isinstance(bad.error, RequestError)
    assert text in str(bad.error)
    assert [len(output.outputs[0].token_ids) for output in (good, other)] == [8, 8]


def test_the_prompts_of_a_call_start_together(make, model):
    llm = make()
    llm.generate([[1, 2, 3], "", [4], [5, 6]], GREEDY)
    assert model.steps[0].query_lens == (3, 2, 1)


def test_a_prompt_that_is_nothing(make):
    llm = make()
    for wrong in (None, 5, b"abc", {1, 2}):
        with pytest.raises(RequestError, match="a prompt is a"):
            llm.generate(wrong, GREEDY)


def test_chat(make):
    llm = make()
    messages = [{"role": "user", "content": "Hi"}]
    output = llm.chat(messages, GREEDY)
    assert llm.tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False) == (
        "<|user|>Hi</s>\n<|assistant|>"
    )
    two = llm.chat([messages, [{"role": "user", "content": "Ho"}]], GREEDY)
    assert two[0].text == output.text
    assert llm.chat_token_ids(messages, chat_template="{{ messages[0].content }}") == (
        llm.tokenizer.encode("Hi")
    )
    with pytest.raises(RequestError, match="messages must be"):
        llm.chat("Hi", GREEDY)


def test_stream(make):
    llm = make()
    whole = llm.generate("Hello", GREEDY)
    outputs = list(llm.stream("Hello", GREEDY))
    assert "".join(output.outputs[0].text_diff for output in outputs) == whole.text
    assert outputs[-1].finished
    with pytest.raises(RequestError, match="empty"):
        llm.stream("", GREEDY)


def test_await_and_async_for(make):
    llm = make()
    whole = llm.generate("Hello", GREEDY)

    async def main():
        together = await asyncio.gather(*(llm.generate_async("Hello", GREEDY) for _ in range(5)))
        assert [output.text for output in together] == [whole.text] * 5
        pieces = [
            output.outputs[0].text_diff
            async for output in llm.generate_async("Hello", GREEDY, streaming=True)
        ]
        assert "".join(pieces) == whole.text
        ends = [output async for output in llm.generate_async("Hello", GREEDY)]
        assert [output.text for output in ends] == [whole.text]
        done = llm.generate_async("Hello", GREEDY)
        done.result(timeout=30)
        assert (await done).text == whole.text

    asyncio.run(asyncio.wait_for(main(), 60))


def test_cancelling_aborts(make, model):
    model.before_step = lambda metadata: time.sleep(0.002)
    llm = make()
    long = SamplingParams(temperature=0, max_tokens=200)

    async def main():
        generation = llm.generate_async("Hello", long)
        task = asyncio.ensure_future(generation.aresult())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return generation

    generation = asyncio.run(main())
    assert generation.result(timeout=30).outputs[0].finish_reason == "abort"


def test_a_request_that_fails_under_way_raises_where_it_is_waited_for(make, model):
    model.logits_of = lambda tokens, positions: [float("nan")] * 97
    llm = make()
    with pytest.raises(RequestError, match="not finite"):
        llm.generate("a", GREEDY)
    with pytest.raises(RequestError, match="not finite"):
        list(llm.stream("a", GREEDY))
    assert llm.generate(["a"], GREEDY)[0].outputs[0].finish_reason == "error"

    async def main():
        await llm.generate_async("a", GREEDY)

    with pytest.raises(RequestError, match="not finite"):
        asyncio.run(main())


def test_abort_by_name(make, model):
    model.before_step = lambda metadata: time.sleep(0.002)
    llm = make()
    generation = llm.generate_async("a", SamplingParams(max_tokens=200), request_id="mine")
    llm.abort("mine")
    assert generation.result(timeout=30).outputs[0].finish_reason == "abort"


def test_a_failing_step_raises_even_in_a_list(make, model):
    def fail(metadata):
        raise ArithmeticError("a broken layer")

    llm = make()
    model.before_step = fail
    with pytest.raises(EngineError, match="a broken layer") as caught:
        llm.generate(["a", "b"], GREEDY)
    assert isinstance(caught.value.__cause__, ArithmeticError)


def test_generation_config(make):
    config = {"temperature": 0.25, "top_k": 3, "max_new_tokens": 5, "eos_token_id": [7, 8]}
    llm = make(config=config)
    assert llm.default_sampling_params.top_k == 3
    assert len(llm.generate("Hello").outputs[0].token_ids) <= 5
    assert llm._engine._intake.eos_ids == {7, 8, 96}
    plain = make(config=config, generation_config="none")
    assert plain.default_sampling_params == SamplingParams().resolved()
    assert plain._engine._intake.eos_ids == {7, 8, 96}
    with pytest.raises(UsageError, match="generation_config='vllm'"):
        make(generation_config="vllm")


def test_unknown_keyword_tells_the_nearest(make):
    with pytest.raises(UsageError, match="'max_num_seq'") as caught:
        make(max_num_seq=3)
    assert caught.value.hint == "did you mean 'max_num_seqs'?"


@pytest.mark.parametrize(
    "setting", [{"block_size": 0}, {"max_num_seqs": -1}, {"kv_cache_memory": "lots"}, {"seed": 1.5}]
)
def test_settings_out_of_range(make, setting):
    block_size = setting.get("block_size")
    with pytest.raises(UsageError, match=next(iter(setting))):
        LLM("x", **setting) if block_size is not None else make(**setting)


def test_what_load_model_is_asked(make):
    make(
        dtype="float32",
        kernels="reference",
        attention_backend="vanilla",
        load_format="dummy",
        plugin="p",
    )
    asked = make.asked
    assert (asked["dtype"], asked["kernels"], asked["attn_backend"]) == (
        "float32",
        "reference",
        "vanilla",
    )
    assert (asked["load_format"], asked["plugin"], asked["block_size"]) == ("dummy", "p", 4)


def test_without_tokenizer(make, model):
    llm = make(skip_tokenizer_init=True)
    output = llm.generate([1, 2, 3], GREEDY)
    assert output.outputs[0].token_ids == model.expected([1, 2, 3], 8)
    assert output.text == ""
    for call in (llm.generate, llm.stream):
        with pytest.raises(RequestError, match="no tokenizer"):
            call("text", GREEDY)
    with pytest.raises(RequestError, match="chat needs a tokenizer"):
        llm.chat([{"role": "user", "content": "Hi"}])
    with pytest.raises(UsageError, match="skip_tokenizer_init"):
        make(skip_tokenizer_init=True, tokenizer="x")


def test_tokenizer_of_another_directory_and_a_missing_one(make, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        make(tokenizer=other)
    write_tokenizer(other, bos=True)
    assert make(tokenizer=other).tokenizer.encode("a")[0] == 95


def test_the_tokenizer_of_a_model_by_its_alias(make):
    pytest.importorskip("llmfw_llama")
    assert make(tokenizer="smollm2").tokenizer.vocab_size > 1000


def test_stats_and_timings(make):
    llm = make()
    output = llm.generate("Hello", GREEDY)
    assert 0 <= output.timings.time_to_first_token <= output.timings.total
    assert llm.stats().generated_tokens == 8
    assert llm.max_model_len == 256


def test_with_block_ends_the_thread(make):
    with make() as llm:
        thread = llm._engine._thread
        assert thread.is_alive()
    assert not thread.is_alive()
    with pytest.raises(EngineError, match="shut down"):
        llm.generate("a", GREEDY)


def test_a_forgotten_llm_is_cleaned_up(tmp_path, monkeypatch):
    write_tokenizer(tmp_path)
    config = SimpleNamespace(
        pretrained_config=SimpleNamespace(),
        device=torch.device("cpu"),
        attn_backend="auto",
        max_model_len=64,
    )
    loaded = SimpleNamespace(
        model=TinyAttentionModel(), model_config=config, generation_config={}, engine=None,
        source=SimpleNamespace(model_dir=tmp_path),
    )  # fmt: skip
    monkeypatch.setattr(llmfw.llm, "load_model", lambda name, **settings: loaded)
    llm = LLM("x")
    thread = llm._engine._thread
    llm.generate("a", GREEDY)
    del llm
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_keyboard_interrupt_aborts_all(make, model, monkeypatch):
    model.before_step = lambda metadata: time.sleep(0.002)
    llm = make()
    interrupted = threading.Event()

    def result(self, timeout=None):
        interrupted.set()
        raise KeyboardInterrupt

    monkeypatch.setattr("llmfw.engine.generation.Generation.result", result)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], SamplingParams(max_tokens=200))
    deadline = time.monotonic() + 20
    while llm.stats().aborted < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    assert interrupted.is_set()
    assert llm.stats().aborted == 2


SCRIPT = """
    import sys, time
    sys.path.insert(0, {tests!r})
    from types import SimpleNamespace
    import torch, llmfw.llm
    from engine_models import HistoryModel
    from llmfw import LLM, SamplingParams
    model = HistoryModel()
    model.before_step = lambda metadata: time.sleep(0.005)
    config = SimpleNamespace(
        pretrained_config=SimpleNamespace(), device=torch.device("cpu"), attn_backend="auto",
        max_model_len=256,
    )
    llmfw.llm.load_model = lambda name, **settings: SimpleNamespace(
        model=model, model_config=config, generation_config={{}}, engine=None
    )
    llm = LLM("x", skip_tokenizer_init=True)
    long = SamplingParams(max_tokens=200)
    {body}
"""

EXITS = {
    "with work under way": "handle = llm.generate_async([1, 2], long); print(not handle.finished)",
    "in the middle of a stream": "print(not next(llm.stream([1, 2], long)).finished)",
}


@pytest.mark.parametrize("case", EXITS)
def test_clean_exit_without_shutdown(case):
    script = textwrap.dedent(SCRIPT).format(
        tests=str(Path(__file__).parent.parent), body=EXITS[case]
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
