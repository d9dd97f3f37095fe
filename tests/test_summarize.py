"""`llmfw summarize`: the data, the prompts, the test of equivalence, and the command."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from cli_helpers import run
from llmfw.engine.tokenizer import Tokenizer
from llmfw.errors import TokenizerError, UsageError
from llmfw.models.convert import convert_checkpoint
from llmfw.testing.reference import write_checkpoint
from llmfw_cli.summarize.data import Source, read_samples
from llmfw_cli.summarize.measure import Task, run_engines
from llmfw_cli.summarize.prompts import PLAIN, Prompts
from llmfw_cli.summarize.report import LOSS, Threshold, compare
from llmfw_cli.summarize.scores import KINDS, Rouge
from llmfw_cli.summarize.statistics import Verdict, equivalence, means
from parity import tiny_hf
from tiny_tokenizer import tiny_backend, write_tokenizer

# The data.


def test_the_built_in_articles_are_whole() -> None:
    samples = read_samples(Source(), 100)
    assert len(samples) == 16
    assert len({sample.article for sample in samples}) == 16
    for sample in samples:
        assert 150 <= len(sample.article.split()) <= 400
        assert 25 <= len(sample.summary.split()) < len(sample.article.split()) / 2


ROWS = [{"id": 1, "text": "one\ntwo", "summary": "a, b"}, {"id": 2, "text": "3", "summary": "c"}]


def write_rows(path: Path) -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in ROWS), "utf-8")
    elif path.suffix == ".csv":
        path.write_text('id,text,summary\n1,"one\ntwo","a, b"\n2,3,c\n', "utf-8")
    else:
        pyarrow = pytest.importorskip("pyarrow", reason="parquet is read by pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_files_are_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{kind}"
    write_rows(path)
    samples = read_samples(Source(str(path)), 5)
    assert [(each.article, each.summary) for each in samples] == [("one\ntwo", "a, b"), ("3", "c")]
    assert len(read_samples(Source(str(path)), 1)) == 1
    (swapped,) = read_samples(Source(str(path), article="summary", summary="text"), 1)
    assert (swapped.article, swapped.summary) == ("a, b", "one\ntwo")


@pytest.mark.parametrize(
    ("text", "source", "message"),
    [
        ("{", {}, "line 1 of .* is not JSON"),
        ("[1]", {}, "line 1 of .* is no JSON object"),
        ("", {}, "has no rows"),
        ('{"text": "a"}', {}, "no column highlights or summary or reference"),
        ('{"text": "a", "summary": "b"}', {"article": "body"}, "no column body"),
        ('{"text": " ", "summary": "b"}', {}, "no text in its column text"),
        ('{"text": 5, "summary": "b"}', {}, "no text in its column text"),
    ],
)
def test_rows_that_cannot_be(
    text: str, source: dict[str, str], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text, "utf-8")
    with pytest.raises(UsageError, match=message) as caught:
        read_samples(Source(str(path), **source), 5)
    assert caught.value.hint


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        read_samples(Source(str(tmp_path / "none.csv")), 5)
    broken = tmp_path / "rows.parquet"
    broken.write_bytes(b"no parquet")
    pytest.importorskip("pyarrow", reason="parquet is read by pyarrow")
    with pytest.raises(UsageError, match="cannot be read"):
        read_samples(Source(str(broken)), 5)
    other = tmp_path / "rows.xml"
    other.write_text("x")
    with pytest.raises(UsageError, match="of no kind"):
        read_samples(Source(str(other)), 5)
    latin = tmp_path / "rows.csv"
    latin.write_bytes(b"text,summary\n\xe9,b\n")
    with pytest.raises(UsageError, match="cannot be read"):
        read_samples(Source(str(latin)), 5)


def test_a_set_without_network_or_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real = builtins.__import__

    def refuse(name: str, *rest: object, **more: object) -> object:
        if name == "datasets":
            raise ImportError("No module named 'datasets'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UsageError, match=r"needs `datasets`, which is not installed"):
        read_samples(Source("nobody/no-such-set"), 5)


def test_a_set_that_cannot_be_had() -> None:
    pytest.importorskip("datasets", reason="comes with the extra eval")
    with pytest.raises(UsageError, match="the set nobody/no-such-set cannot be had") as caught:
        read_samples(Source("nobody/no-such-set"), 5)
    assert "--split" in str(caught.value.hint)


# The prompts.


@pytest.mark.parametrize("chat", [False, True])
def test_long_articles_are_cut_and_the_question_stays(chat: bool) -> None:
    template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    tokenizer = Tokenizer(tiny_backend(), templates={"default": template})
    prompts = Prompts(tokenizer, 30, PLAIN, chat=chat)
    short, long = prompts.ids("abc"), prompts.ids("abcdefgh " * 10)
    assert tokenizer.decode(short) == ("<abc\nTL;DR:>" if chat else "abc\nTL;DR:")
    assert len(long) == 30
    end = "\nTL;DR:>" if chat else "\nTL;DR:"
    assert tokenizer.decode(long).endswith(end)


def test_shorter_beginnings_of_an_article() -> None:
    tokenizer = Tokenizer(tiny_backend())
    prompts = Prompts(tokenizer, 30, PLAIN, chat=False)
    for article in ("abcdefghijkl", "abcdefgh " * 10):
        whole = len(prompts.ids(article)) - len(prompts.ids(""))
        for share in (1.0, 0.75, 0.5):
            text = tokenizer.decode(prompts.ids(article, share))
            kept = text.removesuffix("\nTL;DR:")
            assert article.startswith(kept)
            assert len(tokenizer.encode(kept)) == pytest.approx(whole * share, abs=1)


def test_prompts_that_cannot_be() -> None:
    tokenizer = Tokenizer(tiny_backend())
    with pytest.raises(UsageError, match=r"has no \{article\}"):
        Prompts(tokenizer, 30, "Summarize this", chat=False)
    with pytest.raises(UsageError, match="no room for an article"):
        Prompts(tokenizer, 7, PLAIN, chat=False)


# The test of equivalence.


def test_the_interval_is_that_of_students_t() -> None:
    # Student's own data (Biometrika 6, 1908): ten differences of sleep, mean 1.58.
    sleep = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    found = equivalence(sleep, margin=3.0, alpha=0.025)
    assert found.mean == pytest.approx(1.58)
    assert (found.low, found.high) == pytest.approx((0.7001, 2.4599), abs=1e-4)
    assert found.verdict is Verdict.EQUIVALENT
    assert equivalence(sleep, margin=2.0, alpha=0.025).verdict is Verdict.DIFFERENT


def test_what_few_samples_do_not_show_is_not_called_equal() -> None:
    found = equivalence([5.0, -5.0, 4.0, -4.0], margin=2.0, alpha=0.05)
    assert found.verdict is Verdict.NOT_SHOWN
    assert found.enough is not None
    enough = equivalence([5.0, -5.0, 4.0, -4.0] * (found.enough // 4 + 1), margin=2.0, alpha=0.05)
    assert enough.verdict is Verdict.EQUIVALENT
    far = equivalence([5.0, -1.0, 4.0, 1.0], margin=2.0, alpha=0.05)
    assert (far.verdict, far.enough) == (Verdict.NOT_SHOWN, None)


def test_engines_that_differ_by_the_margin_pass_at_most_alpha_of_the_time() -> None:
    generator = random.Random(7)
    passed = 0
    for _ in range(2000):
        differences = [generator.gauss(2.0, 1.0) for _ in range(16)]
        found = equivalence(differences, margin=2.0, alpha=0.05)
        passed += found.verdict is Verdict.EQUIVALENT
    assert 60 <= passed <= 140  # 100 are expected; the standard deviation is 9.7


def test_prompts_of_one_article_are_one_sample() -> None:
    assert means([1.0, 3.0, 5.0, -1.0], [0, 0, 1, 1]) == [2.0, 2.0]
    generator = random.Random(3)
    passed = 0
    for _ in range(2000):
        # The articles' own differences are 2 in the mean, each prompt adds something of its own.
        articles = [generator.gauss(2.0, 1.0) for _ in range(16)]
        values = [generator.gauss(article, 3.0) for article in articles for _ in range(4)]
        groups = [number for number in range(16) for _ in range(4)]
        found = equivalence(means(values, groups), margin=2.0, alpha=0.05)
        assert found.count == 16
        passed += found.verdict is Verdict.EQUIVALENT
    assert 60 <= passed <= 140


def test_equal_and_infinite_differences() -> None:
    assert equivalence([0.0, 0.0], margin=0.1, alpha=0.05).verdict is Verdict.EQUIVALENT
    assert equivalence([0.0, float("nan")], margin=1, alpha=0.05).verdict is Verdict.DIFFERENT
    for values, margin, alpha in (([0.0], 1, 0.05), ([0, 0], 0, 0.05), ([0, 0], 1, 0.5)):
        with pytest.raises(UsageError):
            equivalence(values, margin=margin, alpha=alpha)


def test_rouge_is_in_points() -> None:
    scores = Rouge()("the cat sat", "the cats sat down")
    assert scores["rouge1"] == pytest.approx(100 * 2 * 0.75 * 1 / 1.75)
    assert set(scores) == set(KINDS)


class Fake:
    """An engine that answers with what it was given, its losses shifted."""

    def __init__(self, name: str, shift: float, calls: list[str]) -> None:
        self.name, self.shift, self.calls = name, shift, calls

    def complete(self, prompts: list[list[int]]) -> list[list[int]]:
        self.calls.append(f"{self.name}{len(prompts)}")
        return [prompt[:4] for prompt in prompts]

    def log_likelihood(self, ids: list[int]) -> float:
        return -(len(ids) - 1) * (2.0 + self.shift)


def test_engines_take_turns_and_their_losses_are_compared() -> None:
    calls: list[str] = []
    tokenizer = Tokenizer(tiny_backend())
    tasks = [
        Task(tokenizer.encode("abcd efg"), "abcd", tokenizer.encode("abcdefgh" * n))
        for n in (1, 2, 3)
    ]
    runs = run_engines(
        [Fake("llmfw", 0.02, calls), Fake("hf", 0.0, calls)],
        tasks,
        tokenizer,
        Rouge(),
        batch_size=2,
        perplexity=True,
    )
    assert calls == ["llmfw1", "hf1", "llmfw2", "hf2", "hf1", "llmfw1"]  # the first two are warm-up
    assert runs[0].rouge["rouge1"] == 100.0
    assert runs[0].losses == pytest.approx([2.02] * 3)
    assert runs[1].perplexity == pytest.approx(7.389056)
    assert (runs[0].new_tokens, len(runs[0].seconds)) == (12, 2)
    tests = compare(*runs, Threshold(alpha=0.05, rouge=2.0, perplexity=0.01))
    assert tests["rouge1"].verdict is Verdict.EQUIVALENT
    assert tests[LOSS].verdict is Verdict.DIFFERENT
    wide = compare(*runs, Threshold(alpha=0.05, rouge=2.0, perplexity=0.03))
    assert wide[LOSS].verdict is Verdict.EQUIVALENT


# The command.


def write_llama(folder: Path, seed: int) -> Path:
    """A tiny random Llama with a tokenizer, which transformers loads too."""
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=95,
        eos_token_id=96,
    )
    model = tiny_hf(config, "LlamaForCausalLM")
    with torch.no_grad():
        torch.manual_seed(seed)
        model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight) * seed)
    raw = {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    write_checkpoint(model, raw, folder)
    return write_tokenizer(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"), seed=0)


SMALL = ("--device", "cpu", "--max-ite", "3", "--output_len", "8", "--max-input-length", "100")


def test_summarize_both_and_check(llama: Path, tmp_path: Path) -> None:
    options = ("--eval_ppl", "--check_accuracy", "--batch_size", "2", "--output_dir", str(tmp_path))
    done = run("summarize", "--engine_dir", str(llama), *SMALL, *options)
    assert done.exit_code == 0, done.output
    assert "perplexity" in done.stdout
    assert "equivalent" in done.stdout
    assert "same summaries: 6 of 6" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    ours, theirs = report["engines"]["llmfw"], report["engines"]["hf"]
    assert ours["rouge"] == theirs["rouge"]
    assert ours["perplexity"] == pytest.approx(theirs["perplexity"], rel=1e-5)
    assert {ours["new_tokens"], theirs["new_tokens"]} == {48}
    lines = (tmp_path / "summaries.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 6
    assert all(row["llmfw"]["token_ids"] == row["hf"]["token_ids"] for row in rows)


def test_another_model_is_found_out(llama: Path, tmp_path: Path) -> None:
    other = write_llama(tmp_path / "other", seed=1)
    options = ("--eval-ppl", "--check-accuracy", "--hf-model-dir", str(other), "--json")
    done = run("summarize", "--model", str(llama), *SMALL, *options)
    assert done.exit_code == 1, done.output
    report = json.loads(done.stdout)
    assert report["differences"][LOSS]["verdict"] == "different"


@pytest.mark.parametrize("engine", ["llmfw", "hf"])
def test_one_engine_alone(engine: str, llama: Path) -> None:
    done = run("summarize", "--model", str(llama), *SMALL, f"--test_{engine}", "--json")
    assert done.exit_code == 0, done.output
    assert list(json.loads(done.stdout)["engines"]) == [engine]


def test_several_prompts_of_each_article(llama: Path, tmp_path: Path) -> None:
    options = ("--prompts-per-article", "2", "--check-accuracy", "--json")
    done = run("summarize", "--model", str(llama), *SMALL, *options, "--output-dir", str(tmp_path))
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["articles"], report["samples"], report["same_summaries"]) == (3, 6, 6)
    assert report["differences"]["rouge1"]["count"] == 3
    lines = (tmp_path / "summaries.jsonl").read_text("utf-8").splitlines()
    articles = [json.loads(line)["article"] for line in lines]
    assert (len(articles), len(set(articles))) == (6, 3)


def test_beams(llama: Path) -> None:
    done = run("summarize", "--model", str(llama), *SMALL, "--num_beams", "3", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["same_summaries"] == 3


def test_transformers_alone_with_the_tokenizer_of_another_model(
    llama: Path, tmp_path: Path
) -> None:
    convert_checkpoint(llama, tmp_path / "converted")  # its tokenizer is in a folder of it
    words = ["summarize", "--model", str(llama), *SMALL, "--test-hf", "--tokenizer"]
    done = run(*words, str(tmp_path / "converted"))
    assert done.exit_code == 0, done.output
    done = run(*words, "no-such-model")
    assert done.exit_code == TokenizerError.exit_code
    assert "tokenizer 'no-such-model' is neither a directory nor a model\n" in done.stderr


def test_what_is_refused(llama: Path) -> None:
    done = run("summarize", "--model", str(llama), "--test-hf", "--check-accuracy")
    assert done.exit_code == 2
    assert "only one of them" in done.stderr
    done = run("summarize", "--model", str(llama), "--output-len", "127", "--device", "cpu")
    assert done.exit_code == 2
    assert "no room for an article" in done.stderr
    done = run("summarize", "--model", str(llama), *SMALL, "--max-ite", "1", "--check-accuracy")
    assert done.exit_code == 2
    assert "one sample says nothing of accuracy" in done.stderr


@pytest.mark.parametrize(
    ("option", "value"),
    [("--alpha", "0.5"), ("--rouge-margin", "0"), ("--ppl-margin", "-2"), ("--ppl-margin", "nan")],
)
def test_a_threshold_that_cannot_be_is_refused_before_the_run(option: str, value: str) -> None:
    done = run("summarize", "--model", "no-such-model", "--eval-ppl", option, value)
    assert (done.exit_code, done.stdout) == (2, "")
    assert f"error: {option} {value} cannot be\n" in done.stderr
