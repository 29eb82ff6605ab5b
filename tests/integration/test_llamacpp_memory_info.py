# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""llamacpp_memory_info on a real engine: what a real llama-server says it took, and what cannot be read."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ansible_collections.homelab.inference.plugins.module_utils.container import connect, of_process

IMAGE = "homelab-inference/llama.cpp:dev"
ROOT = Path(__file__).parents[2]
PREFIX = f"lmi-{secrets.token_hex(3)}"


def docker(*args):
    return subprocess.run(["docker", *args], capture_output=True, text=True, timeout=120, check=True).stdout.strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    subprocess.run([sys.executable, ROOT / "tests/images/model/build.py", path], check=True, capture_output=True)
    return path


@pytest.fixture(scope="module", autouse=True)
def containers():
    yield
    names = docker("ps", "-aq", "--filter", f"name=^{PREFIX}").split()
    subprocess.run(["docker", "rm", "-f", *names], capture_output=True, check=False)


def serve(name, folder, *options):
    """Start a server of the processor alone, and wait until it serves."""
    where = ["--network", "none", "-v", f"{folder}:/models:ro", "--entrypoint", "llama-server", IMAGE]
    what = ["-m", "/models/chat.gguf", "--port", "8080", "--parallel", "1", "--fit", "off", "--device", "none"]
    docker("run", "-d", "--name", name, *where, *what, *options)
    wait_until_it_serves(name)


def wait_until_it_serves(name):
    asked = ["docker", "exec", name, "curl", "-sf", "localhost:8080/health"]
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if subprocess.run(asked, capture_output=True, check=False).returncode == 0:
            return
        time.sleep(0.2)
    raise AssertionError(subprocess.run(["docker", "logs", name], capture_output=True, text=True, check=False))


def ask(*names):
    """Run the module as a task would."""
    arguments = json.dumps({"servers": [{"name": name, "devices": []} for name in names]})
    command = ["ansible", "localhost", "-o", "-m", "homelab.inference.llamacpp_memory_info", "-a", arguments]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [*command, "-e", f"ansible_python_interpreter={sys.executable}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
        cwd=ROOT,
    )
    return json.loads(done.stdout.partition("=> ")[2])


def test_what_the_server_took_is_read_from_its_last_start(folder):
    name = f"{PREFIX}-chat"
    serve(name, folder, "--ctx-size", "4096", "--verbosity", "4")
    docker("stop", "-t", "2", name)
    docker("start", name)
    wait_until_it_serves(name)
    answer = ask(name)
    assert answer["changed"] is False and answer["problems"] == []
    found = answer["servers"][name]
    assert found["memory"].keys() == {"host"}
    # chat.gguf has 2 layers with 2 KV heads of 32 elements: see tests/images/model/build.py
    assert found["memory"]["host"]["kv"] == pytest.approx(expected_kv(folder, 4096), abs=0.02)
    assert found["layers"] is None
    assert found["started_at"] == json.loads(docker("inspect", name))[0]["State"]["StartedAt"]


def expected_kv(folder, context):
    from gguf import GGUFReader

    fields = GGUFReader(folder / "chat.gguf").fields
    value = {name.partition(".")[2]: field.contents() for name, field in fields.items() if name.startswith("llama.")}
    length = value["embedding_length"] // value["attention.head_count"]
    return context * value["block_count"] * value["attention.head_count_kv"] * length * 2 * 2 / 2**20


def test_a_quiet_server_and_an_absent_one_are_problems_and_no_zeroes(folder):
    quiet, absent = f"{PREFIX}-quiet", f"{PREFIX}-absent"
    serve(quiet, folder, "--ctx-size", "512", "--verbosity", "1")
    answer = ask(quiet, absent)
    assert answer["servers"] == {}
    errors = {problem["name"]: problem["error"] for problem in answer["problems"]}
    assert errors[quiet].startswith(f"Reading the memory of {quiet} failed: ")
    assert absent in errors[absent]


def test_what_the_driver_says_of_a_process_belongs_to_the_container_it_runs_in(folder):
    """The container is real; what a driver would say is typed, there is no card here."""
    name = f"{PREFIX}-cards"
    cards = ["-e", "CUDA_VISIBLE_DEVICES=GPU-b,GPU-a", "--entrypoint", "sleep", IMAGE, "60"]
    docker("run", "-d", "--name", name, "--network", "none", *cards)
    pid = int(docker("inspect", "--format", "{{.State.Pid}}", name))
    said = {(pid, "GPU-a"): 500, (pid, "GPU-c"): 3, (os.getpid(), "GPU-b"): 9}
    client = connect()
    assert of_process(client, name, ["gpu1", "gpu0"], said) == {"gpu0": 500}
    assert of_process(client, name, ["gpu1", "gpu0"], {**said, (pid, "GPU-b"): 7}) == {"gpu0": 500, "gpu1": 7}
    assert of_process(client, name, ["gpu0"], said) == {}, "these are not its cards"
    assert of_process(client, name, [], said) == {}
