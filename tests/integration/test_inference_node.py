# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Role inference_node in a stranger's playbook, on a real machine on which somebody already runs something."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from systemd_node import LLAMA_IMAGE, RPC_SERVER, Node

ROOT = Path(__file__).resolve().parents[2]
ANSIBLE = str(Path(sys.executable).with_name("ansible-playbook"))
KEY = "key-of-the-test-3141592653"
SERVERS = ("chat", "code", "embed")
# What makes an engine, for a machine that has none yet.
ENGINE = ("/usr/bin/docker", "/usr/sbin/dockerd", "/usr/lib/python3/dist-packages/docker")


class Lab(Node):
    folder: Path

    def play(self, instances: list[dict], *arguments: str, tasks_from: str = "main", rc: int = 0, **more) -> str:
        """Apply the role; the result is what the run printed."""
        playbook = [
            {
                "hosts": "all",
                "gather_facts": False,
                "tasks": [
                    {
                        "ansible.builtin.include_role": {
                            "name": "homelab.inference.inference_node",
                            "tasks_from": tasks_from,
                        }
                    }
                ],
            }
        ]
        variables = {"inference_node_instances": instances, "inference_node_api_key": KEY, **more}
        (self.folder / "play.json").write_text(json.dumps(playbook))
        (self.folder / "variables.json").write_text(json.dumps(variables))
        command = [
            ANSIBLE,
            "-i",
            f"{self.name},",
            "-c",
            "community.docker.docker",
            "-e",
            f"@{self.folder}/variables.json",
        ]
        done = subprocess.run(
            [*command, f"{self.folder}/play.json", *arguments],
            env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == rc, done.stdout + done.stderr
        return done.stdout

    def units(self) -> list[str]:
        return self(
            "cd /etc/systemd/system; ls llamacpp-*.service multi-user.target.wants/llamacpp-* 2>/dev/null; true"
        ).split()

    def containers(self) -> set[str]:
        return set(self("docker ps -a --format '{{.Names}}'").split())

    def somebody(self) -> str:
        return self("docker inspect -f '{{.State.Status}} {{.State.StartedAt}} {{.State.Pid}}' somebody")


def changed(output: str) -> int:
    return int(re.search(r"changed=(\d+)", output).group(1))


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory):
    models = tmp_path_factory.mktemp("models")
    subprocess.run([sys.executable, ROOT / "tests/images/model/build.py", models], check=True, capture_output=True)
    with Lab() as node:
        node.folder = tmp_path_factory.mktemp("play")
        node.load(LLAMA_IMAGE)
        for name in SERVERS:
            node.write(f"/srv/models/{name}.gguf", (models / f"{name}.gguf").read_bytes())
        node.write("/srv/models/broken.gguf", b"GGUF, but not really")
        node(f"docker run -d --name somebody --entrypoint sleep {LLAMA_IMAGE} 1d")
        yield node


@pytest.fixture(scope="module")
def instances(node: Lab) -> list[dict]:
    found = []
    address = node("docker network inspect -f '{{(index .IPAM.Config 0).Gateway}}' bridge")
    for index, name in enumerate(("chat", "code")):
        port = 50052 + index
        node(
            f"docker run -d --network host --name gpu{index} --entrypoint {RPC_SERVER}"
            f" {LLAMA_IMAGE} -H 0.0.0.0 -p {port}"
        )
        gpu = {"id": f"gpu{index}", "vendor": "emulated", "name": "emulated", "uuid": f"e{index}", "pci": None}
        gpu |= {"memory_mib": 512, "memory_kind": "dedicated", "endpoint": f"{address}:{port}"}
        found.append(
            {
                "name": name,
                "backend": "emulated",
                "image": LLAMA_IMAGE,
                "devices": [gpu],
                "port": 8080 + index,
                "volume": "library",
                "library": "/srv/models",
                "model_file": f"{name}.gguf",
                "server_options": {"ctx-size": 512, "parallel": 1, "n-gpu-layers": 99},
                "ready_timeout": 120,
            }
        )
    files = [{"name": "embed.gguf", "path": "/srv/models/embed.gguf"}]
    embed = {"name": "embed", "image": LLAMA_IMAGE, "port": 8082, "mode": "embedding", "cpus": 1.0}
    return [*found, {**embed, "volume": "embed", "model_file": "embed.gguf", "files": files}]


def test_a_dry_run_on_a_machine_without_an_engine_says_what_would_be(node: Lab, instances: list[dict]) -> None:
    node("systemctl stop docker docker.socket")
    for path in ENGINE:
        node(f"mv {path} {path}.away")
    try:
        output = node.play(instances, "--check", "--diff")
        assert node.run("test -e /etc/homelab-inference", check=False).returncode != 0
    finally:
        for path in ENGINE:
            node(f"mv {path}.away {path}")
        node("systemctl reset-failed docker docker.socket; systemctl start docker; docker start somebody gpu0 gpu1")
    for name in SERVERS:
        assert re.search(rf"^changed: .*\(item={name}\)", output, re.M)
    assert KEY not in output


def test_deploy_again_change_and_take_off(node: Lab, instances: list[dict]) -> None:
    """One story: each step starts from what the one before has left."""
    before = node.somebody()
    node.play(instances)
    assert {f"llamacpp-{name}" for name in SERVERS} <= node.containers()
    assert len(node.units()) == 6
    status = json.loads(node("python3 /usr/local/lib/homelab-inference/node.py status"))
    assert [(one["name"], one["state"]) for one in status["servers"]] == [(name, "HEALTHY") for name in SERVERS]
    assert node("stat -c '%a %U' /etc/homelab-inference/api-key") == "600 root"
    assert KEY not in node("docker inspect llamacpp-chat; ps -ef; cat /etc/homelab-inference/slice.json")
    taken = {
        name: float(
            re.search(
                r"^([0-9.]+) .*start lock taken", node(f"journalctl -q -u llamacpp-{name} -o short-unix"), re.M
            ).group(1)
        )
        for name in ("chat", "code")
    }
    assert taken["chat"] < taken["code"]
    # Started together by boot, they keep that order; the one on the CPU waits for nobody.
    assert "llamacpp-chat.service" in node("systemctl show --value -p After llamacpp-code").split()
    assert "llamacpp-code.service" not in node("systemctl show --value -p After llamacpp-embed").split()

    started = node("docker inspect -f '{{.State.StartedAt}}' llamacpp-chat llamacpp-code llamacpp-embed")
    assert changed(node.play(instances)) == 0
    assert changed(node.play(instances, "--check", "--diff")) == 0
    assert node("docker inspect -f '{{.State.StartedAt}}' llamacpp-chat llamacpp-code llamacpp-embed") == started

    # chat breaks, code has gone: chat is named, code is gone, embed is not touched.
    broken = copy.deepcopy([instances[0], instances[2]])
    broken[0]["model_file"] = "broken.gguf"
    output = node.play(broken, rc=2)
    summary = output[output.index("TASK [homelab.inference.inference_node : Failures | Name what did not work]") :]
    assert re.search(r"^\s*chat: Starting llamacpp-chat failed: ", summary, re.M)
    assert "embed" not in summary
    assert "llamacpp-code" not in node.containers()
    assert not [unit for unit in node.units() if "code" in unit]
    assert node("docker inspect -f '{{.State.StartedAt}}' llamacpp-embed") == started.splitlines()[2]

    # The whole list again, then nothing of it.
    node.play(instances)
    assert changed(node.play([], "--check", tasks_from="remove")) > 0
    node.play([], tasks_from="remove")
    assert node.containers() == {"somebody", "gpu0", "gpu1"}
    assert node.units() == []
    assert (
        node("ls -d /etc/homelab-inference /usr/local/lib/homelab-inference /run/homelab-inference 2>/dev/null; true")
        == ""
    )
    assert {"embed", "library"} <= set(node("docker volume ls -q").split())
    assert changed(node.play([], tasks_from="remove")) == 0

    # An empty list does the same.
    node.play(instances[2:])
    node.play([], inference_node_remove_data=True)
    assert "embed" not in node("docker volume ls -q").split()
    assert node("ls /srv/models").split() == ["broken.gguf", "chat.gguf", "code.gguf", "embed.gguf"]
    assert node.somebody() == before


def test_units_and_containers_of_others_are_refused_and_left_alone(node: Lab, instances: list[dict]) -> None:
    node.write("/etc/systemd/system/llamacpp-chat.service", "[Service]\nExecStart=/usr/bin/sleep 1d\n")
    try:
        output = node.play(instances[:1], rc=2)
        assert "a unit of that name exists which this role did not write" in re.sub(r"\s+", " ", output)
        node.play([], tasks_from="remove")
        assert "sleep 1d" in node("cat /etc/systemd/system/llamacpp-chat.service")
    finally:
        node("rm /etc/systemd/system/llamacpp-chat.service; systemctl daemon-reload")
    node(f"docker create --name llamacpp-embed {LLAMA_IMAGE} sleep 1d")
    try:
        assert "which this collection did not make" in re.sub(r"\s+", " ", node.play(instances[2:], rc=2))
        node.play([], tasks_from="remove")
        assert "llamacpp-embed" in node.containers()
    finally:
        node("docker rm --force llamacpp-embed")
