"""A third party's kernel pack, installed beside llmfw: found, chosen, checked, timed, used."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cli_helpers import write_tiny_model
from plugin_fakes import write_dist

PACK = Path(__file__).parent / "acme_kernels"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed pack and one that is broken."""
    folder = tmp_path_factory.mktemp("site")
    source = shutil.copytree(PACK, tmp_path_factory.mktemp("source") / "acme")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(folder), str(source)], check=True, timeout=240)
    points = {"llmfw.kernels": {"broken": "broken_pack:pack"}}
    write_dist(folder, "broken-pack", entry_points=points, code="import no_such_module_at_all\n")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_model(tmp_path_factory.mktemp("model"))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["architectures"] = ["AcmeForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


def llmfw(site: Path, *arguments: str, exit_code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command where the site folder is installed, too."""
    done = subprocess.run(
        [sys.executable, "-m", "llmfw_cli", *arguments],
        env={**os.environ, "PYTHONPATH": str(site), "LLMFW_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == exit_code, done.stderr
    return done


def test_it_is_listed_and_a_broken_one_left_out(site: Path) -> None:
    done = llmfw(site, "kernels", "list", "--json")
    value = json.loads(done.stdout)
    ours = {row["kernel"]: row for row in value["kernels"] if row["pack"] == "acme"}
    assert set(ours) == {"acme.squared_relu", "acme.squared_relu_wrong", "acme.rms_norm"}
    assert ours["acme.squared_relu"]["state"] == "at hand"
    (problem,) = [each for each in value["left_out"] if each["pack"] == "broken"]
    assert problem["distribution"] == "broken-pack 0.1.0"
    assert "no_such_module_at_all" in problem["reason"]
    assert "the kernel pack broken of broken-pack 0.1.0 is left out" in done.stderr


@pytest.mark.slow
def test_a_model_takes_it(site: Path, model: Path) -> None:
    done = llmfw(site, "kernels", "list", "--model", str(model), "--json")
    choices = {row["op"]: row for row in json.loads(done.stdout)["choices"]}
    assert choices["squared_relu"]["chosen"] == "acme.squared_relu"
    assert choices["rms_norm"]["chosen"] == "acme.rms_norm"
    without = llmfw(site, "kernels", "list", "-m", str(model), "--kernels", "-acme", "--json")
    choices = {row["op"]: row for row in json.loads(without.stdout)["choices"]}
    assert choices["squared_relu"]["chosen"] == "reference"
    assert "acme.rms_norm: switched off by name" in choices["rms_norm"]["passed over"]


@pytest.mark.slow
def test_its_tokens_are_those_of_the_references(site: Path, model: Path) -> None:
    """Both ways in one process: float32, greedy."""
    script = f"""
from llmfw import LLM, SamplingParams
tokens = []
for kernels in ("auto", "acme", "reference"):
    with LLM({str(model)!r}, load_format="dummy", kernels=kernels, device="cpu") as llm:
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        outputs = llm.generate([[3, 4, 5], [6, 7]], params)
        tokens.append([output.outputs[0].token_ids for output in outputs])
        chosen = {{c.context.op: c.chosen for c in llm.loaded.model_config.ops.choices.values()}}
        assert (chosen["squared_relu"] == "reference") == (kernels == "reference"), chosen
assert tokens[0] == tokens[1] == tokens[2], tokens
"""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_it_is_checked(site: Path) -> None:
    good = llmfw(site, "kernels", "check", "-k", "acme.squared_relu", "-k", "acme.rms_norm")
    assert [line.split()[-1] for line in good.stdout.splitlines()[1:]] == ["ok", "ok"]
    bad = llmfw(site, "kernels", "check", "--kernel", "acme", "--json", exit_code=1)
    states = {row["kernel"]: row["state"] for row in json.loads(bad.stdout)["kernels"]}
    assert "differ" in states.pop("acme.squared_relu_wrong")
    assert set(states.values()) == {"ok"}


@pytest.mark.slow
def test_it_is_timed(site: Path) -> None:
    arguments = ["--op", "squared_relu", "--dtype", "float32", "--json"]
    rows = json.loads(llmfw(site, "kernels", "bench", *arguments).stdout)["kernels"]
    assert {row["kernel"] for row in rows} == {"acme.squared_relu", "acme.squared_relu_wrong"}
    assert all(row["gb_per_s"] > 0 and row["gflops"] > 0 for row in rows)


@pytest.mark.slow
def test_a_broken_pack_that_was_asked_for_is_an_error(site: Path, model: Path) -> None:
    arguments = ["--model", str(model), "--kernels", "broken"]
    done = llmfw(site, "kernels", "list", *arguments, exit_code=8)
    assert "broken-pack 0.1.0 cannot be loaded" in done.stderr
    assert done.stdout == ""
