"""`llmfw run` as TensorRT-LLM's run.py: its options, files, lines, profiling and debugging."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cli_helpers import run, tiny_arguments, tiny_model  # noqa: F401
from llmfw.plugins import unregister_local
from llmfw_cli.guide import ALIASES, DEFAULT_PROMPT, GuideCommand


@pytest.fixture(autouse=True)
def forget_the_tiny_plugin() -> Iterator[None]:
    yield
    unregister_local("TinyForCausalLM")


@pytest.fixture
def tiny(tiny_model: Path) -> list[str]:  # noqa: F811
    return ["run", *tiny_arguments(tiny_model), "--max-tokens", "5", "--ignore-eos"]


@pytest.fixture
def guide(tiny_model: Path) -> list[str]:  # noqa: F811
    """The same in the guide's words."""
    words = tiny_arguments(tiny_model)
    return ["run", "--engine_dir", *words[1:], "--max_output_len", "5", "--ignore_eos"]


def command() -> GuideCommand:
    from typer.main import get_command

    from llmfw_cli.app import app

    return get_command(app).commands["run"]  # type: ignore[attr-defined, no-any-return]


def test_every_alias_means_an_option_that_exists() -> None:
    options = {name for param in command().params for name in param.opts}
    assert {alias.ours for alias in ALIASES.values()} <= options
    assert not set(ALIASES) & options


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("--max_output_len 3", "--max-tokens 3"),
        ("--max-output-len=3", "--max-tokens=3"),
        ("--num_beams 2 --run_profiling", "--num-beams 2 --run-profiling"),
        ("--stop_words a b --bad_words c", "--stop a --stop b --bad-word c"),
        ("--input_text one two -n 1", "--labels --prompt one --prompt two -n 1"),
        ("--input-text one --input_text two", "--labels --prompt one --prompt two"),
        ("--engine_dir d --tokenizer_dir t", "--labels --model d --tokenizer t"),
        ("--prompt --max_output_len x", "--prompt --max_output_len x"),
        ("-p --input_text x", "-p --input_text x"),
        ("--stop_words a - -- --input_text b", "--stop a --stop - -- --input_text b"),
        ("--json x y", "--json x y"),
        (
            "--kv_cache_free_gpu_memory_fraction 0.5 --enable_chunked_context x",
            "--kv-cache-memory 0.5 --chunked-prefill x",
        ),
        ("--kv_cache_enable_block_reuse", "--prefix-caching"),
    ],
)
def test_the_guide_s_words_in_ours(theirs: str, ours: str) -> None:
    assert command().in_our_words(theirs.split()) == ours.split()


@pytest.mark.parametrize("word", ["--stop_words", "--input-text", "--num_beams", "-p"])
def test_an_option_without_its_value_is_named_as_it_was_given(word: str) -> None:
    done = run("run", "--model", "x", word)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == f"error: {word} needs a value\n  llmfw run --help shows what there is\n"


def test_one_option_by_two_names_is_refused() -> None:
    for words in (
        ("--model", "a", "--engine_dir", "b"),
        ("--max_output_len=3", "--max-tokens", "4"),
    ):
        done = run("run", *words)
        first, second = (word.split("=")[0].replace("_", "-") for word in (words[0], words[-2]))
        assert done.exit_code == 2
        assert f"error: {first} and {second} are the same option\n" in done.stderr
    given = "--input_text a --prompt b --num-beams 2 --num_beams 3"
    assert command().in_our_words(given.split())  # several may be given, or the last counts


def test_its_lines(guide: list[str], tiny: list[str]) -> None:
    done = run(*guide, "--input_text", "hello world", "one two", "--num_beams", "2")
    assert done.exit_code == 0, done.stderr
    outputs = json.loads(
        run(
            *tiny, "-p", "hello world", "-p", "one two", "--num-beams", "2", "--n", "2", "--json"
        ).stdout
    )["outputs"]
    expected = []
    for i, prompt in enumerate(("hello world", "one two")):
        expected.append(f'Input [Text {i}]: "{prompt}"')
        texts = [each["text"] for each in outputs if each["prompt_index"] == i]
        expected += [f'Output [Text {i} Beam {j}]: "{text}"' for j, text in enumerate(texts)]
    assert done.stdout.splitlines() == expected
    assert len(expected) == 6


def test_its_prompt_and_streams(guide: list[str], tiny: list[str]) -> None:
    whole = run(*guide)
    assert whole.stdout.startswith(f'Input [Text 0]: "{DEFAULT_PROMPT}"\nOutput [Text 0 Beam 0]: "')
    assert run(*guide, "--streaming").stdout == whole.stdout
    several = ["-p", "hello", "-p", "one two"]
    assert run(*tiny, *several, "--streaming").stdout == run(*tiny, *several).stdout
    ours = run(*tiny, "--labels", "--json")
    assert json.loads(ours.stdout)["prompt_tokens"] > 0


def test_a_stream_that_fails_lets_the_others_finish(tiny: list[str]) -> None:
    done = run(*tiny, "-p", "hello " * 70, "-p", "one", "--streaming")
    assert done.exit_code == 14
    assert done.stdout.startswith("--- prompt 2, completion 1 ---\n")
    assert "the prompt has 70 tokens" in done.stderr


def test_prompts_from_files(tiny: list[str], tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("3, 4\n\n5,6,7,\n", "utf-8")
    np.save(tmp_path / "p.npy", np.array([[3, 4, -1], [5, 6, 7]], dtype=np.int32))
    (tmp_path / "p.jsonl").write_text(
        '"hello world"\n{"prompt_token_ids": [5, 6, 7]}\n\n{"prompt": "hello world", "id": 4}\n'
        "[3]\n"
    )
    (tmp_path / "p.txt").write_text("hello\nworld\n", "utf-8")
    tokens = {}
    for name in ("p.csv", "p.npy", "p.jsonl", "p.txt"):
        done = run(*tiny, "--prompt-file", str(tmp_path / name), "--json")
        assert done.exit_code == 0, done.stderr
        value = json.loads(done.stdout)
        tokens[name] = value["prompt_tokens"]
    assert tokens == {"p.csv": [2, 3], "p.npy": [2, 3], "p.jsonl": [2, 3, 2, 1], "p.txt": 2}
    labelled = run(*tiny, "--input_file", str(tmp_path / "p.csv"))
    assert 'Input [Text 1]: "one two three"' in labelled.stdout


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.csv", b"1,2\n3,x\n", "a.csv, line 2: 'x' is not a token id"),
        ("a.csv", b"\n", "a.csv holds no prompt"),
        ("a.txt", b"", "a.txt holds no prompt"),
        ("a.txt", b"\n", "a.txt holds no prompt"),
        ("a.jsonl", b'"x"\n{"prompt"', "a.jsonl, line 2: no JSON at column 10"),
        ("a.jsonl", b'{"text": "x"}', "a.jsonl, line 1: an object with the keys ['text']"),
        ("a.jsonl", b"[1, 2.5]", "a.jsonl, line 1: [1, 2.5] is no prompt"),
        ("a.jsonl", b'{"prompt": 3}', "a.jsonl, line 1: 3 is no prompt"),
        ("a.npy", b"not numpy", "a.npy is no .npy file of numbers"),
        ("a.jsonl", b"\xff", "a.jsonl is not UTF-8 text: byte 0"),
    ],
)
def test_files_that_are_no_prompts(
    tiny: list[str], tmp_path: Path, name: str, content: bytes, text: str
) -> None:
    (tmp_path / name).write_bytes(content)
    done = run(*tiny, "--prompt-file", str(tmp_path / name))
    assert (done.exit_code, done.stdout) == (2, "")
    assert text in done.stderr


def test_arrays_that_are_no_prompts(tiny: list[str], tmp_path: Path) -> None:
    for array in (np.zeros((2, 3)), np.zeros((1, 2, 3), dtype=np.int64)):
        np.save(tmp_path / "a.npy", array)
        done = run(*tiny, "--prompt-file", str(tmp_path / "a.npy"))
        assert (done.exit_code, done.stdout) == (2, "")
        assert f"a.npy holds {array.dtype} {list(array.shape)}" in done.stderr
    np.save(tmp_path / "a.npy", np.array([[3]]))
    assert run(*tiny, "--prompt-file", str(tmp_path / "a.npy"), "--chat").exit_code == 2


def test_files_of_results(tiny: list[str], tmp_path: Path) -> None:
    ids, table, logits = (tmp_path / "new" / name for name in ("o.csv", "o.npy", "l.npy"))
    files = ["--output_csv", ids, "--output_npy", table, "--output_logits_npy", logits]
    done = run(*tiny, "-p", "hello", "-p", "one two", "--json", *map(str, files))
    assert done.exit_code == 0, done.stderr
    outputs = json.loads(done.stdout)["outputs"]
    expected = [[3, *outputs[0]["token_ids"]], [5, 6, *outputs[1]["token_ids"]]]
    with ids.open() as file:
        assert [list(map(int, row)) for row in csv.reader(file)] == expected
    assert np.load(table).tolist() == [[*expected[0], -1], expected[1]]
    context = np.load(tmp_path / "new" / "l_context.npy")
    generation = np.load(tmp_path / "new" / "l_generation.npy")
    assert context.shape == (3, 10)
    assert generation.shape == (2, 5, 10)
    chosen = generation.argmax(-1).tolist()
    assert chosen == [output["token_ids"] for output in outputs]
    assert np.array_equal(context[2], generation[1, 0])
    beams = run(
        *tiny, "-p", "hello", "--num-beams", "2", "--output-logits-npy", str(tmp_path / "b")
    )
    assert beams.exit_code == 0, beams.stderr
    assert sorted(path.name for path in tmp_path.glob("b*")) == ["b_context.npy"]


@pytest.mark.parametrize("option", ["--output-csv", "--output_npy", "--debug-file"])
def test_files_that_cannot_be_written_are_refused_before_the_run(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    (tmp_path / "file").write_text("as it was")
    words = [*tiny, "-p", "hello", "--debug-mode", option]
    done = run(*words, str(tmp_path / "file" / "below"))
    assert (done.exit_code, done.stdout) == (2, "")
    assert "cannot be made" in done.stderr
    assert run(*words, str(tmp_path)).stderr == f"error: {tmp_path} is a folder\n  name a file\n"

    def refuse(file: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(Path, "open", refuse)
    done = run(*words, str(tmp_path / "other"))
    assert (done.exit_code, done.stdout) == (2, "")
    assert f"{tmp_path / 'other'} cannot be written: Permission denied" in done.stderr


def test_profiling(tiny: list[str]) -> None:
    words = ["-p", "hello world", "--run_profiling", "--profiling-repeats", "3"]
    value = json.loads(run(*tiny, *words, "--json").stdout)["profiling"]
    assert (value["repeats"], value["batch_size"], value["output_tokens"]) == (3, 1, 5)
    latency = value["latency_s"]
    assert 0 < latency["min"] <= latency["median"] <= latency["max"]
    assert value["output_tokens_per_s"] > 0
    plain = run(*tiny, *words)
    assert plain.stdout.count("\n") == 1
    assert "batch size 1: latency " in plain.stderr


def test_debug_mode(tiny: list[str], tmp_path: Path) -> None:
    file = tmp_path / "inside.npz"
    words = ["-p", "hello world", "--debug_mode", "--debug_file", str(file)]
    done = run(*tiny, *words, "--debug-modules", "*.layers.0.mlp", "--debug-modules", "lm_head")
    assert done.exit_code == 0, done.stderr
    assert str(file) in done.stderr
    arrays = np.load(file)
    steps = {name.split("/")[0] for name in arrays.files}
    assert steps == {f"{step:04d}" for step in range(5)}
    assert arrays["0000/input_ids"].tolist() == [3, 4]
    assert arrays["0000/model.layers.0.mlp"].shape == (2, 32)
    assert arrays["0004/model.layers.0.mlp"].shape == (1, 32)
    wrong = run(*tiny, *words, "--debug-modules", "nonsense*")
    assert wrong.exit_code == 2
    assert "no module is named 'nonsense*'" in wrong.stderr


def test_beams_as_options(tiny: list[str]) -> None:
    beams = ["-p", "hello", "--num-beams", "3", "--json", "--length_penalty", "2.0"]
    one = json.loads(run(*tiny, *beams, "--early_stopping", "1").stdout)
    assert len(one["token_ids"]) == 5
    three = json.loads(run(*tiny, *beams, "--num_return_sequences", "3").stdout)
    assert [output["index"] for output in three["outputs"]] == [0, 1, 2]
    assert run(*tiny, *beams, "--early-stopping", "soon").exit_code == 2
    assert run(*tiny, *beams, "--n", "4").exit_code == 2
    assert run(*tiny, *beams, "--top-k", "4").exit_code == 2
