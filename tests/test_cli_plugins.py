"""`llmfw plugins`, `kernels` and `env`: what is told of the installation."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cli_helpers import run
from llmfw_cli.probe import probe
from plugin_fakes import model_dist, write_dist

HOOKS = """
from llmfw.plugins import hookimpl
class Plugin:
    @hookimpl
    def {name}(self): ...
plugin = Plugin()
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fake distributions that this process and its children see."""
    model_dist(tmp_path, "sound-one", "SoundForCausalLM", code=HOOKS.format(name="llmfw_model"))
    model_dist(tmp_path, "broken-one", "BrokenForCausalLM", code="import no_such_module_here\n")
    model_dist(tmp_path, "alien-one", "AlienForCausalLM", code=HOOKS.format(name="llmfw_fly"))
    model_dist(tmp_path, "old-one", "OldForCausalLM", requires=("llmfw-core<0.0.1",))
    model_dist(tmp_path, "rival-one", "SoundForCausalLM", version="2.0")
    model_dist(tmp_path, "leaves", "LeavesForCausalLM", code="import os; os._exit(3)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def states(stdout: str) -> dict[str, str]:
    return {row["dist"]: row["state"] for row in json.loads(stdout)["plugins"]}


def test_list_tells_what_metadata_tell(site: Path) -> None:
    done = run("plugins", "list", "--json")
    assert done.exit_code == 0, done.stderr
    found = states(done.stdout)
    assert found["sound-one"] == "conflicts with rival-one 2.0"
    assert found["old-one"].startswith("requires llmfw-core<0.0.1, installed is ")
    assert found["broken-one"] == "ok", "it is not imported"
    assert found["llmfw-core"] == "ok"
    table = run("plugins", "list").stdout.splitlines()
    assert table[0].split() == [
        "group",
        "name",
        "distribution",
        "version",
        "entry",
        "point",
        "state",
    ]


def test_list_tells_of_switches(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMFW_DISABLE_PLUGINS", "rival-one")
    found = states(run("plugins", "list", "--json").stdout)
    assert found["rival-one"] == "switched off by LLMFW_DISABLE_PLUGINS"
    assert found["sound-one"] == "ok"
    monkeypatch.delenv("LLMFW_DISABLE_PLUGINS")
    monkeypatch.setenv("LLMFW_PREFER", "rival-one")
    found = states(run("plugins", "list", "--json").stdout)
    assert found["rival-one"] == "preferred to sound-one 0.1.0"
    monkeypatch.setenv("LLMFW_PREFER", "no-such-one")
    assert run("plugins", "list").exit_code == 2


def test_a_fallback_is_listed_and_switched_off(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_dist(site, "falls-back", "*", code=HOOKS.format(name="llmfw_model"))
    monkeypatch.setenv("LLMFW_DISABLE_PLUGINS", "llmfw-transformers")
    found = states(run("plugins", "list", "--json").stdout)
    assert found["llmfw-transformers"] == "switched off by LLMFW_DISABLE_PLUGINS"
    assert found["falls-back"] == "ok"
    monkeypatch.setenv("LLMFW_NO_FALLBACK", "1")
    found = states(run("plugins", "list", "--json").stdout)
    assert found["falls-back"] == "switched off by LLMFW_NO_FALLBACK"


def test_info_is_of_one_distribution(site: Path) -> None:
    value = json.loads(run("plugins", "info", "Old_One", "--json").stdout)
    assert value["distribution"] == "old-one"
    assert value["provides"] == ["llmfw.models: OldForCausalLM = old_one:plugin"]
    assert value["requires"] == ["llmfw-core<0.0.1"]
    assert len(value["unmet"]) == 1
    assert "old-one" in run("plugins", "info", "old-one").stdout


def test_doctor_tries_each_alone(site: Path) -> None:
    done = run("plugins", "doctor", "--json")
    value = json.loads(done.stdout)
    found = {
        row["dist"]: row["state"] for row in value["plugins"] if row["group"] == "llmfw.models"
    }
    assert "No module named 'no_such_module_here'" in found["broken-one"]
    assert "llmfw_fly is not a hook" in found["alien-one"]
    assert found["old-one"].startswith("requires llmfw-core")
    assert found["sound-one"].startswith("conflicts with")
    assert found["leaves"].startswith("ended with code 3")
    assert {row["dist"]: row["state"] for row in value["plugins"]}["llmfw-core"] == "ok"
    codes = [int(row["exit_code"]) for row in value["plugins"] if row["exit_code"] != "0"]
    assert sorted(codes) == [7, 7, 8, 8, 9, 10]
    assert done.exit_code == codes[0]
    assert value["problems"] == []


def test_a_sound_plugin_passes_the_probe(site: Path) -> None:
    found = probe("llmfw.models", "SoundForCausalLM", "sound_one:plugin", "sound-one", "0.1.0")
    assert found["state"] == "ok"
    assert float(found["seconds"]) >= 0


def test_damaged_metadata_are_told(site: Path) -> None:
    info = write_dist(site, "damaged", entry_points={"llmfw.models": {"X": "x:y"}})
    (info / "METADATA").write_text("Metadata-Version: 2.4\n\n", "utf-8")
    done = run("plugins", "list")
    assert done.exit_code == 0
    assert "warning: the metadata of" in done.stderr
    assert "damaged" in done.stderr


def test_kernels_list_says_why_a_pack_was_dropped(site: Path) -> None:
    points = {"llmfw.kernels": {"sick": "pack_sick_cli:pack"}}
    write_dist(site, "pack-sick-cli", entry_points=points, code="import no_such_module_here\n")
    done = run("kernels", "list", "--device", "cpu", "--json")
    assert done.exit_code == 0, done.stderr
    value = json.loads(done.stdout)
    assert [problem["pack"] for problem in value["left_out"]] == ["sick"]
    assert "No module named 'no_such_module_here'" in value["left_out"][0]["reason"]
    assert "the kernel pack sick of pack-sick-cli 0.1.0 is left out" in done.stderr
    assert "cpu" in value["features"]
    assert {"op", "kernel", "pack", "priority", "dtypes", "state"} == set(value["kernels"][0])
    assert "left out: sick of pack-sick-cli 0.1.0" in run("kernels", "list").stdout


@pytest.mark.parametrize(
    ("chosen", "states"),
    [
        ((), {"bent.act": "at hand", "bent.on_demand": "serves only when asked for by name"}),
        (("--kernels", "reference"), {"bent.act": "references were asked for"}),
        (("--kernels=-bent",), {"bent.act": "switched off by name"}),
        (("--kernels", "bent"), {"bent.act": "at hand", "bent.on_demand": "at hand"}),
        (("--dtype", "bf16"), {"bent.act": "serves float32, not bfloat16"}),
        (("--kernels", "bent.on_demand"), {"bent.on_demand": "at hand"}),
    ],
)
def test_kernels_list_tells_what_a_selection_leaves_out(
    site: Path, chosen: tuple[str, ...], states: dict[str, str]
) -> None:
    write_dist(
        site,
        "pack-bent-cli",
        entry_points={"llmfw.kernels": {"bent": "pack_bent_cli:pack"}},
        code="from llmfw.plugins import hookimpl\n"
        "from llmfw.ops.kernel import Kernel\n"
        "class Pack:\n"
        "    @hookimpl\n"
        "    def llmfw_kernels(self, device):\n"
        "        act, kind = 'silu_and_mul', ('float32',)\n"
        "        often = Kernel(act, 'bent.act', 'pack_bent_cli:make', dtypes=kind, priority=500)\n"
        "        on_demand = Kernel(act, 'bent.on_demand', 'pack_bent_cli:make', priority=-1)\n"
        "        return [often, on_demand]\n"
        "pack = Pack()\n",
    )
    done = run("kernels", "list", "--device", "cpu", "--json", *chosen)
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)["kernels"]
    told = {row["kernel"]: row["state"] for row in rows}
    assert {name: told[name] for name in states} == states
    first = next(row["kernel"] for row in rows if row["op"] == "silu_and_mul")
    assert first == ("bent.on_demand" if "bent.on_demand" in chosen else "bent.act")


def test_kernels_list_refuses_what_no_pack_offers(site: Path) -> None:
    done = run("kernels", "list", "--device", "cpu", "--kernels", "no.such")
    assert done.exit_code == 12
    assert "--kernels names 'no.such', which no kernel pack offers" in done.stderr
    assert run("kernels", "list", "--device", "cpu", "--dtype", "int3").exit_code == 2
    points = {"llmfw.kernels": {"ill": "pack_ill_cli:pack"}}
    write_dist(site, "pack-ill-cli", entry_points=points, code="import no_such_module_here\n")
    done = run("kernels", "list", "--device", "cpu", "--kernels", "ill")
    assert done.exit_code > 2
    assert "No module named 'no_such_module_here'" in done.stderr


def test_env_is_for_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMFW_DTYPE", "float32")
    value = json.loads(run("env", "--json").stdout)
    assert set(value) == {"versions", "machine", "devices", "plugins", "environment"}
    assert value["environment"]["LLMFW_DTYPE"] == "float32"
    assert "cpu" in value["devices"]
    assert run("env").stdout.startswith("versions\n  python")


def test_version_names_every_distribution() -> None:
    done = run("--version")
    assert done.exit_code == 0
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert {"llmfw-cli", "llmfw-core", "python", "torch"} <= set(names)
    assert len(names) == len(set(names))


def test_kernels_list_of_a_model_tells_each_choice(tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = run("kernels", "list", "--model", str(tmp_path), "--kernels", "reference", "--json")
    value = json.loads(done.stdout)
    assert value["plugin"].startswith("llmfw-llama")
    assert {row["chosen"] for row in value["choices"]} == {"reference"}
    by_op = {row["op"]: row for row in value["choices"]}
    assert by_op["rms_norm"]["shape"] == "hidden_size=64"
    assert by_op["rms_norm"]["details"] == ""
    assert "cupy.rms_norm: references were asked for" in by_op["rms_norm"]["passed over"]


def test_kernels_list_tells_what_a_kernel_settled_for(site: Path, tmp_path: Path) -> None:
    write_dist(
        site,
        "pack-tuned-cli",
        entry_points={"llmfw.kernels": {"tuned": "pack_tuned_cli:pack"}},
        code="from llmfw.plugins import hookimpl\n"
        "from llmfw.ops.kernel import Kernel\n"
        "def factory(context):\n"
        "    def run(x, weight, eps, offset=0.0):\n"
        "        return x\n"
        "    run.details = '8 threads'\n"
        "    return run\n"
        "class Pack:\n"
        "    @hookimpl\n"
        "    def llmfw_kernels(self, device):\n"
        "        return [Kernel('rms_norm', 'tuned', 'pack_tuned_cli:factory', priority=999)]\n"
        "pack = Pack()\n",
    )
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64}
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({**config, **sizes}))
    done = run("kernels", "list", "--model", str(tmp_path), "--device", "cpu")
    assert "rms_norm hidden_size=64: 8 threads" in done.stdout.splitlines()


def test_kernels_check_tells_a_wrong_kernel(site: Path) -> None:
    points = {"llmfw.kernels": {"wrong": "pack_wrong_cli:pack"}}
    write_dist(
        site,
        "pack-wrong-cli",
        entry_points=points,
        code="from llmfw.plugins import hookimpl\n"
        "from llmfw.ops.kernel import Kernel\n"
        "class Pack:\n"
        "    @hookimpl\n"
        "    def llmfw_kernels(self, device):\n"
        "        return [Kernel('silu_and_mul', 'wrong.act', 'pack_wrong_cli:make')]\n"
        "pack = Pack()\n"
        "def make(context):\n"
        "    return lambda x: x.chunk(2, dim=-1)[0] * 1\n",
    )
    done = run("kernels", "check", "--device", "cpu", "--kernel", "wrong")
    assert done.exit_code == 1
    assert "wrong.act" in done.stdout
    assert "differ" in done.stdout
    assert "error" in done.stdout
    assert re.fullmatch(r"checking wrong\.act: 54 cases, \d+\.\d s\n", done.stderr)
    assert run("kernels", "check", "--kernel", "absent").exit_code == 2
