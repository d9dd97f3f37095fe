"""llmfw as a model of lm-eval, held against lm-eval's own model for transformers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cli_helpers import run
from llmfw import SamplingParams
from llmfw.engine.tokenizer import Tokenizer
from llmfw.errors import RequestError, UsageError
from llmfw_cli.lm_eval import evaluate
from llmfw_cli.lm_eval.chat import render
from llmfw_cli.summarize.data import Source, read_samples
from test_summarize import write_llama
from tiny_tokenizer import tiny_backend

pytest.importorskip("lm_eval", reason="lm-eval comes with the extra eval of llmfw-cli")

# Packages of lm-eval's warn of their own dependencies.
pytestmark = pytest.mark.filterwarnings("default")


TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}[{{ m['content'] | trim }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Well, "},
]


def test_a_chat_is_rendered_without_a_system_message_that_is_refused() -> None:
    tokenizer = Tokenizer(tiny_backend(), templates={"default": TEMPLATE})
    assert render(tokenizer, CHAT[:2], add_generation_prompt=True) == "[Hi]>"
    assert render(tokenizer, CHAT, add_generation_prompt=False) == "[Hi][Well,"
    with pytest.raises(RequestError, match="no system"):
        render(
            Tokenizer(tiny_backend(), templates={"default": "{{ raise_exception('no system') }}"}),
            CHAT[1:],
            add_generation_prompt=True,
        )


def test_an_answer_that_the_template_changes_cannot_be_continued() -> None:
    tokenizer = Tokenizer(tiny_backend(), templates={"default": "nothing"})
    with pytest.raises(RequestError, match="changes the last message"):
        render(tokenizer, CHAT[1:], add_generation_prompt=False)


def test_the_extra_is_named_where_lm_eval_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.models", None)
    done = run("eval", "--model", "smollm2", "--tasks", "none")
    assert done.exit_code == 2
    assert 'pip install "llmfw-cli[eval]"' in done.stderr


def test_what_lm_eval_refuses_is_no_internal_error() -> None:
    samples = ("--samples", '{"a": [1]}', "--limit", "3")
    done = run("eval", "--model", "smollm2", "--tasks", "a", *samples)
    assert done.exit_code == 2
    assert "error: lm-eval: If --samples is not None, then --limit must be None." in done.stderr
    assert "python -m llmfw_cli.lm_eval ls tasks" in done.stderr


def test_a_fault_of_ours_stays_an_internal_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty() -> None:
        raise ValueError("a fault of ours")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", faulty)
    with pytest.raises(ValueError, match="a fault of ours") as caught:
        evaluate(["run"])
    assert not isinstance(caught.value, UsageError)


@pytest.mark.slow
def test_an_unknown_task_is_named() -> None:
    done = run("eval", "--model", "smollm2", "--tasks", "nosuch")
    assert done.exit_code == 2
    assert "error: lm-eval: Tasks not found: nosuch" in done.stderr


def test_a_model_is_named_once() -> None:
    from llmfw_cli.lm_eval.model import LlmfwLM

    for names in ({}, {"model": "a", "pretrained": "b"}):
        with pytest.raises(UsageError, match="must name one model"):
            LlmfwLM(**names)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A tiny Llama with one token a character, and windows of ten."""
    from llmfw_cli.lm_eval.model import LlmfwLM

    folder = write_llama(tmp_path_factory.mktemp("tiny"), seed=0)
    model = LlmfwLM(str(folder), device="cpu", kernels="reference", max_length=10, batch_size=8)
    yield model
    model.llm.shutdown()


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]


def test_scores_are_the_models_own(tiny: Any) -> None:
    """Each is the sum that the engine's prompt_logprobs give for the same window."""
    pairs = [("abc", "def"), ("abcdefghijkl", "mnopq"), ("", "xyz"), ("abc", "dxf")]
    found = tiny.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (score, greedy) in zip(pairs, found, strict=True):
        ids = tiny.tok_encode(context) or [95]
        ids = [*ids, *tiny.tok_encode(continuation)][-11:]
        whole = tiny.llm.generate(ids, SamplingParams(prompt_logprobs=0, max_tokens=1))
        count = len(continuation)
        entries = [
            entry[token]
            for token, entry in zip(ids[-count:], whole.prompt_logprobs[-count:], strict=True)
        ]
        assert score == pytest.approx(sum(each.logprob for each in entries), abs=1e-5)
        assert greedy == all(each.rank == 1 for each in entries)
    rolled = tiny.loglikelihood_rolling(
        instances("loglikelihood_rolling", ("abcdefghijklm",)), disable_tqdm=True
    )
    windows = [("", "abcdefghij"), ("cdefghij", "klm")]  # BOS stands before the first
    parts = tiny.loglikelihood(instances("loglikelihood", *windows), disable_tqdm=True)
    assert rolled == [pytest.approx(sum(score for score, _ in parts), abs=1e-5)]


def test_answers_end_where_the_task_says(tiny: Any) -> None:
    def answer(context: str, **kwargs: Any) -> str:
        # What SamplingParams knows is handed on; so the random model never ends by itself.
        kwargs |= {"max_gen_toks": 6, "logit_bias": {95: -1e3, 96: -1e3}}
        requests = instances("generate_until", (context, kwargs))
        (text,) = tiny.generate_until(requests, disable_tqdm=True)
        return str(text)

    whole = answer("abc")
    assert len(whole) >= 6  # one character a token, or a filler of several
    assert answer("abc", until=[whole[3:5]]) == whole[: whole.index(whole[3:5])]
    assert answer("zzzzzabcd") == answer("abcd")  # there is room for four
    assert answer("abc", do_sample=False, temperature=0.7) == whole


def test_what_does_not_fit_is_refused(tiny: Any) -> None:
    from llmfw_cli.lm_eval.model import LlmfwLM

    with pytest.raises(UsageError, match="leaves no room"):
        tiny.generate_until(instances("generate_until", ("a", {"max_gen_toks": 10})))
    with pytest.raises(RequestError, match="of 11 tokens cannot be scored"):
        tiny.loglikelihood(instances("loglikelihood", ("a", "abcdefghijk")), disable_tqdm=True)
    with pytest.raises(UsageError, match="has no chat template 'tools'"):
        tiny.chat_template("tools")
    assert "message" in tiny.chat_template(True)
    assert tiny.chat_template(False) is None
    folder = str(tiny.llm.loaded.source.model_dir)
    with pytest.raises(UsageError, match="max_length=127 does not fit"):
        LlmfwLM(folder, device="cpu", kernels="reference", max_length=127)


# Against transformers, on tasks of four types whose data are made here.

LENGTH = 80
"""Of both models' windows: shorter than the longer texts, so that they are cut and rolled."""

CHOICES = [
    ("The capital of France is", [" London", " Paris", " Rome"], 1),
    ("Water freezes at a temperature of", [" zero degrees", " one hundred degrees"], 0),
    ("The opposite of hot is", [" cold", " warm", " fire engines"], 0),
    ("A long story. " * 40 + "The end of it is", [" near", " a very happy one"], 1),
]
QUESTIONS = [
    ("Question: What is the capital of Italy?\nAnswer:", "Rome"),
    ("Question: How many days are in a week?\nAnswer:", "Seven"),
    ("Once upon a time. " * 30 + "There was a", "king"),
    ("", "The"),
]
BASE: dict[str, Any] = {"dataset_path": "json", "test_split": "test", "num_fewshot": 0}
TASKS: list[dict[str, Any]] = [
    {
        "task": "local_choice",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": name} for name in ("acc", "acc_norm")],
    },
    {
        "task": "local_perplexity",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")
        ],
    },
    {
        "task": "local_greedy",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n", ".", "<|im_end|>"], "max_gen_toks": 16},
        "metric_list": [{"metric": "exact_match", "ignore_case": True}],
    },
    {
        "task": "local_continuation",
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": " {{answer}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
]


def write_tasks(folder: Path) -> Path:
    """A task a YAML file (JSON is YAML), and its data."""
    rows: dict[str, list[dict[str, Any]]] = {
        "local_choice": [
            {"question": q, "choices": choices, "answer": answer} for q, choices, answer in CHOICES
        ],
        "local_perplexity": [{"text": each.article} for each in read_samples(Source(), 1)],
        # An empty prompt makes transformers' generate fail, so there is nothing to compare with.
        "local_greedy": [{"question": q, "answer": a} for q, a in QUESTIONS if q],
        "local_continuation": [{"question": q, "answer": a} for q, a in QUESTIONS],
    }
    for task in TASKS:
        data = folder / f"{task['task']}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[task["task"]]), "utf-8")
        whole = {**BASE, "dataset_kwargs": {"data_files": {"test": str(data)}}, **task}
        (folder / f"{task['task']}.yaml").write_text(json.dumps(whole), "utf-8")
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = write_tasks(tmp_path_factory.mktemp("tasks"))
    patch = pytest.MonkeyPatch()
    import datasets

    patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    yield folder
    patch.undo()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_against_hf_smollm2_on_four_types_of_tasks(tasks: Path) -> None:
    pytest.importorskip("accelerate", reason="lm-eval's model for transformers imports it")
    from lm_eval import simple_evaluate
    from lm_eval.api.registry import get_model
    from lm_eval.tasks import TaskManager

    from llmfw_cli.lm_eval import register

    register()
    ours = get_model("llmfw")(
        model="smollm2", dtype="float32", device="cpu", max_length=LENGTH, max_model_len=512
    )
    theirs = get_model("hf")(
        pretrained=str(ours.llm.loaded.source.model_dir),
        dtype="float32",
        device="cpu",
        max_length=LENGTH,
        batch_size=1,
    )
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    names = [task["task"] for task in TASKS]
    found = []
    for model in (ours, theirs):
        made = simple_evaluate(
            model=model, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True
        )
        found.append(made)
    ours.llm.shutdown()
    for name in names:
        mine, other = (figures(made["results"][name]) for made in found)
        assert mine
        assert set(mine) == set(other)
        print(name, mine, other)
        for metric in mine:
            assert mine[metric] == pytest.approx(other[metric], rel=1e-3, abs=1e-3), metric
        for own, reference in zip(*(made["samples"][name] for made in found), strict=True):
            same_answers(own["resps"], reference["resps"])


def figures(result: dict[str, Any]) -> dict[str, float]:
    """The metrics of a task's result."""
    return {
        name: value
        for name, value in result.items()
        if isinstance(value, float) and "stderr" not in name
    }


def same_answers(ours: Any, theirs: Any) -> None:
    """The raw answers: texts and greedy flags equal, log probabilities to 1e-3."""
    if isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs)
        for own, reference in zip(ours, theirs, strict=True):
            same_answers(own, reference)
    elif isinstance(ours, float):
        assert ours == pytest.approx(theirs, abs=1e-3)
    else:
        assert ours == theirs


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command(tasks: Path, tmp_path: Path) -> None:
    done = run(
        *("eval", "--model", "smollm2", "--dtype", "float32", "--device", "cpu"),
        *("--max-model-len", "512", "--tasks", "local_choice,local_greedy"),
        *("--include_path", str(tasks), "--limit", "2", "--output_path", str(tmp_path / "out")),
    )
    assert done.exit_code == 0, done.output
    (written,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(written.read_text("utf-8"))
    assert set(results["results"]) == {"local_choice", "local_greedy"}
    assert results["config"]["model"] == "llmfw"
    assert results["config"]["model_args"] == {
        "model": "smollm2",
        "dtype": "float32",
        "max_model_len": 512,
    }
