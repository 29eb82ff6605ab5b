# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The node program under a real systemd, with real servers on two emulated GPUs behind a real engine."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import jinja2
import pytest
from systemd_node import LLAMA_IMAGE, RPC_SERVER, Node, until

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = [ROOT / "roles/inference_node/files/node.py"]
PROGRAM += [ROOT / f"plugins/module_utils/{name}.py" for name in ("gate", "probe")]
UNIT = ROOT / "roles/inference_node/templates/llamacpp.service.j2"
NAMES = ("chat", "code")


class Lab(Node):
    """A node with two emulated GPUs and one server on each."""

    def prepare(self, models: Path) -> None:
        self.write("/etc/docker/daemon.json", '{"live-restore": true}')
        self("systemctl restart docker")
        self.load(LLAMA_IMAGE)
        for path in PROGRAM:
            self.write(f"/usr/local/lib/homelab-inference/{path.name}", path.read_text())
        self.write("/etc/homelab-inference/api-key", "key-of-the-test\n")
        for index, name in enumerate(NAMES):
            self.write(f"/srv/models/{name}.gguf", (models / f"{name}.gguf").read_bytes())
            self(f"docker run -d --name gpu{index} --entrypoint {RPC_SERVER} {LLAMA_IMAGE} -H 0.0.0.0 -p 50052")
            gpu = self(f"docker inspect -f '{{{{.NetworkSettings.IPAddress}}}}' gpu{index}")
            self(
                f"docker create --name llamacpp-{name} -p 127.0.0.1:808{index}:808{index} --stop-timeout 5"
                f" -v /srv/models:/models:ro -v /etc/homelab-inference/api-key:/api-key:ro"
                f" --entrypoint llama-server {LLAMA_IMAGE}"
                f" --host 0.0.0.0 --port 808{index} --model /models/{name}.gguf --ctx-size 1024"
                f" --parallel 1 --rpc {gpu}:50052 --n-gpu-layers 99 --fit off --metrics --api-key-file /api-key"
            )
            # Without the order that systemd keeps at boot: the lock has to do it alone.
            unit = jinja2.Template(UNIT.read_text()).render(instance={"name": name}, previous="")
            self.write(f"/etc/systemd/system/llamacpp-{name}.service", unit)
        self.declare()
        self("systemctl daemon-reload")

    def declare(self, ready_timeout: int = 60) -> None:
        instances = [
            {
                "name": name,
                "devices": [{"id": f"gpu{index}"}],
                "port": 8080 + index,
                "published_address": "127.0.0.1",
                "mode": "chat",
                "ready_timeout": ready_timeout,
            }
            for index, name in enumerate(NAMES)
        ]
        self.write("/etc/homelab-inference/slice.json", json.dumps({"generation": None, "instances": instances}))

    def start(self, *names: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        units = " ".join(f"llamacpp-{name}" for name in names)
        self.run(f"systemctl reset-failed {units}", check=False)  # a unit that is not loaded has nothing to reset
        return self.run(f"systemctl start {units}", check)

    def shown(self, name: str, what: str) -> str:
        return self(f"systemctl show --value -p {what} llamacpp-{name}")

    def journal(self, name: str) -> list[tuple[float, str]]:
        """What the program of this server wrote, each line with its time."""
        lines = self(f"journalctl -q -u llamacpp-{name} -o short-unix").splitlines()
        return [
            (float(line.split(" ", 1)[0]), line.split(": ", 1)[1])
            for line in lines
            if "python3[" in line and ": " in line
        ]

    def last(self, name: str, text: str) -> float:
        return [at for at, line in self.journal(name) if text in line][-1]

    def pid(self, name: str) -> int:
        return int(self(f"docker inspect -f '{{{{.State.Pid}}}}' llamacpp-{name}"))

    def state(self, name: str) -> str:
        status = json.loads(self("python3 /usr/local/lib/homelab-inference/node.py status"))
        return next(server["state"] for server in status["servers"] if server["name"] == name)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    subprocess.run([sys.executable, ROOT / "tests/images/model/build.py", folder], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def node(models: Path):
    with Lab() as node:
        node.prepare(models)
        yield node


@pytest.fixture
def lab(node: Lab):
    """The node with both servers up."""
    node.start(*NAMES)
    return node


def test_gpu_servers_that_start_together_start_one_after_the_other(node: Lab) -> None:
    node("systemctl stop llamacpp-chat llamacpp-code")
    node.start(*NAMES)
    spans = sorted((node.last(name, "start lock taken"), node.last(name, "start lock released")) for name in NAMES)
    assert spans[0][1] <= spans[1][0] < spans[1][1]
    second = max(NAMES, key=lambda name: node.last(name, "start lock taken"))
    first = min(NAMES, key=lambda name: node.last(name, "start lock taken"))
    assert f"waits for the start lock: {first} holds it to start since " in node.journal(second)[-4][1]
    assert [node.state(name) for name in NAMES] == ["HEALTHY", "HEALTHY"]
    assert json.loads(node("python3 /usr/local/lib/homelab-inference/node.py status"))["start_lock"] is None


def test_a_killed_server_is_served_again(lab: Lab) -> None:
    before = lab.pid("code")
    lab(f"kill -9 {before}")
    until("the restart", lambda: lab.pid("code") not in (0, before))
    until("the first token", lambda: lab.shown("code", "ActiveState") == "active")
    assert lab.state("code") == "HEALTHY"
    assert any("the server ended (exit code 137)" in line for _at, line in lab.journal("code"))


def test_the_engine_restarts_and_the_server_stays_the_same(lab: Lab) -> None:
    before = [(lab.pid(name), lab.shown(name, "MainPID")) for name in NAMES]
    lab("systemctl reset-failed docker docker.socket; systemctl restart docker")
    until("following it again", lambda: "the engine was away" in lab.journal("chat")[-1][1])
    assert [(lab.pid(name), lab.shown(name, "MainPID")) for name in NAMES] == before
    assert [lab.state(name) for name in NAMES] == ["HEALTHY", "HEALTHY"]
    # It still follows it.
    lab(f"kill -9 {before[0][0]}")
    until("the restart", lambda: lab.pid("chat") not in (0, before[0][0]))
    until("the first token", lambda: lab.shown("chat", "ActiveState") == "active")


def test_a_server_that_was_left_running_is_taken_over(lab: Lab) -> None:
    before, program = lab.pid("code"), lab.shown("code", "MainPID")
    lab(f"kill -9 {program}")
    until("the unit's restart", lambda: lab.shown("code", "MainPID") not in ("0", program))
    until("being ready", lambda: lab.shown("code", "ActiveState") == "active")
    assert lab.pid("code") == before
    assert any("llamacpp-code is running: HEALTHY" in line for _at, line in lab.journal("code"))


def test_a_server_without_an_engine_waits_for_it(lab: Lab) -> None:
    lab("systemctl stop llamacpp-code")
    # The unit wants the engine, so that starting it would start the engine too.
    lab("systemctl stop docker docker.socket; systemctl mask --runtime docker docker.socket")
    lab("systemctl start --no-block llamacpp-code")
    until("saying so", lambda: lab.shown("code", "StatusText") == "Waits for the Docker engine")
    assert lab.shown("code", "ActiveState") == "activating"
    lab("systemctl unmask --runtime docker docker.socket; systemctl start docker")
    until("the first token", lambda: lab.shown("code", "ActiveState") == "active")


def test_stopping_the_unit_stops_the_server_and_leaves_no_failure(lab: Lab) -> None:
    lab("systemctl stop llamacpp-code")
    assert lab.pid("code") == 0
    assert lab.shown("code", "ActiveState") == "inactive"


def test_a_server_that_its_owner_stopped_stays_stopped(lab: Lab) -> None:
    lab("docker stop llamacpp-code")
    until("the unit's end", lambda: lab.shown("code", "ActiveState") == "inactive")
    assert lab.pid("code") == 0


def test_a_broken_model_is_named_and_holds_up_no_other(lab: Lab, models: Path) -> None:
    lab("systemctl stop llamacpp-chat llamacpp-code")
    lab.write("/srv/models/chat.gguf", b"GGUF, but not really")
    try:
        assert lab.start(*NAMES, check=False).returncode != 0
        assert lab.state("code") == "HEALTHY"
        until("giving up", lambda: lab.shown("chat", "ActiveState") == "failed")
        assert lab.shown("chat", "ExecMainStatus") == "15"
        said = [line for _at, line in lab.journal("chat") if line.startswith("Starting llamacpp-chat: ")]
        assert said[-1].endswith("the server ended while it was starting. See: docker logs llamacpp-chat")
    finally:
        lab.write("/srv/models/chat.gguf", (models / "chat.gguf").read_bytes())


def test_a_gpu_that_hangs_costs_one_deadline_and_holds_up_no_other(lab: Lab) -> None:
    lab("systemctl stop llamacpp-chat llamacpp-code")
    lab.declare(ready_timeout=8)
    lab("docker kill --signal STOP gpu0")
    try:
        started = time.monotonic()
        assert lab.start(*NAMES, check=False).returncode != 0
        assert time.monotonic() - started < 40
        assert lab.state("code") == "HEALTHY"
        # Too slow is not tried again, and holds no memory.
        assert lab.shown("chat", "ActiveState") == "failed"
        assert lab.shown("chat", "ExecMainStatus") == "12"
        assert lab.pid("chat") == 0
    finally:
        lab("docker kill --signal CONT gpu0")
        lab.declare()


def test_a_server_can_be_stopped_while_it_loads_and_the_next_one_starts(lab: Lab) -> None:
    lab("systemctl stop llamacpp-chat llamacpp-code; docker kill --signal STOP gpu0")
    try:
        lab("systemctl start --no-block llamacpp-chat")
        until("loading", lambda: lab.shown("chat", "StatusText") == "Waits up to 60 s for the first token")
        lab("systemctl start --no-block llamacpp-code")
        until("waiting", lambda: "waits for the start lock: chat holds it" in lab.shown("code", "StatusText"))
        lab("systemctl stop llamacpp-chat")
        assert lab.shown("chat", "ActiveState") == "inactive"
        assert lab.pid("chat") == 0
        until("the first token", lambda: lab.shown("code", "ActiveState") == "active")
    finally:
        lab("docker kill --signal CONT gpu0")


def test_a_server_that_is_not_declared_says_so(node: Lab) -> None:
    done = node.run("python3 /usr/local/lib/homelab-inference/node.py serve other", check=False)
    assert done.returncode == 10
    assert done.stderr == "Serving other: /etc/homelab-inference/slice.json does not name it. Run site.yml.\n"
