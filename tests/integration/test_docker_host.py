# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Role docker_host on a machine with systemd and an engine of its own, on which somebody already runs something."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from systemd_node import Node, until

ANSIBLE = str(Path(sys.executable).with_name("ansible-playbook"))
FILE = "/etc/docker/daemon.json"
OWNERS = {"debug": False, "insecure-registries": ["nas.example:5000"], "max-concurrent-uploads": 2}


class Host(Node):
    """A node on which somebody already runs something."""

    def wait(self, script):
        until(script, lambda: self.run(script, check=False).returncode == 0)

    def config(self):
        return json.loads(self(f"cat {FILE}"))

    def set_config(self, config):
        self.write(FILE, json.dumps(config, indent=4))
        self("systemctl reset-failed docker docker.socket; systemctl restart docker")
        self.wait("docker info")

    def engine_started(self):
        return self("cat /run/docker.pid; systemctl show docker -p ActiveEnterTimestampMonotonic")

    def start_somebodys_container(self):
        """Of an image with nothing in it but sleep."""
        self(
            "cd / && tar -ch usr/bin/sleep $(ldd /usr/bin/sleep | grep -o '/[^ ]*' | cut -c2-) | "
            "docker import - sleep:1 && "
            "docker run -d --name somebody --network none sleep:1 /usr/bin/sleep 1d"
        )

    def somebody(self):
        return self("docker inspect -f '{{.State.Status}} {{.State.StartedAt}} {{.State.Pid}}' somebody")

    def play(self, tmp_path, *args, tasks_from="main", rc=0, **variables):
        """The role in a stranger's playbook; the run's output and the number of changes."""
        playbook = tmp_path / "play.yml"
        role = {"name": "homelab.inference.docker_host", "tasks_from": tasks_from}
        play = {"hosts": "all", "gather_facts": False, "tasks": [{"ansible.builtin.include_role": role}]}
        playbook.write_text(json.dumps([play]))
        inventory = tmp_path / "hosts.yml"
        inventory.write_text(
            json.dumps(
                {
                    "all": {
                        "hosts": {
                            self.name: {
                                "ansible_connection": "community.docker.docker",
                                "ansible_python_interpreter": "/usr/bin/python3",
                            }
                        }
                    }
                }
            )
        )
        extra = {"docker_host_nvidia": "false", **variables}
        done = subprocess.run(
            [ANSIBLE, "-i", str(inventory), str(playbook), "--diff", "-e", json.dumps(extra), *args],
            cwd=Path(__file__).resolve().parents[2],
            env={**os.environ, "ANSIBLE_PIPELINING": "true"},
            capture_output=True,
            text=True,
            timeout=400,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        output = done.stdout + done.stderr
        assert done.returncode == rc, output
        return output, int(re.search(r"changed=(\d+)", output)[1])


@pytest.fixture(scope="module")
def node():
    with Host() as machine:
        yield machine


def test_somebodys_container_and_keys_survive(node, tmp_path):
    node.set_config(OWNERS)
    node.start_somebodys_container()
    somebody, engine = node.somebody(), node.engine_started()
    mine = {"docker_host_insecure_registries": ["192.0.2.10:5000"]}

    output, changes = node.play(tmp_path, "--check", **mine)
    assert changes > 0
    assert node.config() == OWNERS

    # Without consent: the file changes, what can be reloaded is, and the engine goes on.
    output, changes = node.play(tmp_path, **mine)
    assert changes > 0
    assert "was not restarted" in output
    assert "somebody" in output
    config = node.config()
    assert {key: config[key] for key in ("debug", "max-concurrent-uploads")} == {
        "debug": False,
        "max-concurrent-uploads": 2,
    }
    assert config["insecure-registries"] == ["nas.example:5000", "192.0.2.10:5000"]
    assert config["log-opts"] == {"max-size": "10m", "max-file": "3"}
    node.wait(
        "docker info -f '{{.LiveRestoreEnabled}} {{json .RegistryConfig.IndexConfigs}}' | grep true.*192.0.2.10:5000"
    )
    assert (node.somebody(), node.engine_started()) == (somebody, engine)

    # Nothing changes any more, and the restart is still asked for.
    output, changes = node.play(tmp_path, **mine)
    assert changes == 0
    assert "was not restarted" in output

    # With consent the engine restarts, and the container does not notice.
    node.play(tmp_path, docker_host_restart_consent=True, **mine)
    assert node.engine_started() != engine
    assert node.somebody() == somebody
    engine = node.engine_started()
    output, changes = node.play(tmp_path, **mine)
    assert changes == 0
    assert "was not restarted" not in output

    # The removal leaves the owner's file, to the letter.
    node.play(tmp_path, tasks_from="remove")
    assert node.config() == OWNERS
    assert node(f"cat {FILE}") == json.dumps(OWNERS, indent=4)
    assert (node.somebody(), node.engine_started()) == (somebody, engine)
    output, changes = node.play(tmp_path, tasks_from="remove")
    assert changes == 0, output
    node("! ls /etc/homelab-inference")
    node("docker rm -f somebody")


def test_keys_of_the_owner_are_named_and_stay(node, tmp_path):
    node.set_config({**OWNERS, "log-driver": "local"})
    output, changes = node.play(tmp_path)
    assert "log-driver in /etc/docker/daemon.json stays as it is: it is set to local" in output
    assert node.config() == {**OWNERS, "log-driver": "local", "live-restore": True}
    node.play(tmp_path, tasks_from="remove")
    assert node.config() == {**OWNERS, "log-driver": "local"}


def test_a_broken_daemon_json_is_refused_and_kept(node, tmp_path):
    node.set_config(OWNERS)
    broken = '{"debug": false,}'
    node(f"printf '%s' '{broken}' >{FILE}")
    output, dummy = node.play(tmp_path, rc=2)
    assert "Reading /etc/docker/daemon.json failed: it is not valid JSON" in output
    assert node(f"cat {FILE}") == broken
    assert node("docker info -f '{{.ServerVersion}}'")


def test_an_engine_that_refuses_our_keys_runs_again_without_them(node, tmp_path):
    node.set_config(OWNERS)
    node.start_somebodys_container()
    somebody = node.somebody()
    # dockerd --validate does not look at the port.
    wrong = {"docker_host_insecure_registries": ["192.0.2.10:99999"], "docker_host_restart_consent": True}
    output, dummy = node.play(tmp_path, rc=2, **wrong)
    assert "did not come up with our keys" in output
    assert node.config() == {**OWNERS, "live-restore": True}
    node.wait("docker info")
    assert node.somebody() == somebody
    assert node.play(tmp_path, docker_host_restart_consent=True)[1] > 0
    assert node.play(tmp_path)[1] == 0
    assert node.somebody() == somebody
    node("docker rm -f somebody")
    node.play(tmp_path, tasks_from="remove")
    assert node.config() == OWNERS


def test_a_fresh_machine(tmp_path):
    with Host() as node:
        node("systemctl stop docker docker.socket containerd")
        node("DEBIAN_FRONTEND=noninteractive apt-get purge -y docker.io docker-cli python3-docker")
        node("rm -rf /etc/docker /var/lib/apt/lists/*")
        output, planned = node.play(tmp_path, "--check")
        assert "docker.io" in output
        assert planned > 0
        assert "absent" in node("command -v dockerd || echo absent")
        node.play(tmp_path)
        assert node("docker info -f '{{.LoggingDriver}} {{.LiveRestoreEnabled}}'") == "json-file true"
        assert node.play(tmp_path)[1] == 0
        assert node.play(tmp_path, "--check")[1] == 0
        # An engine that this role brought goes when that is asked for, and not before.
        node.play(tmp_path, tasks_from="remove")
        assert node("command -v dockerd")
        node.play(tmp_path, tasks_from="remove", docker_host_remove_engine=True)
        assert "absent" in node("command -v dockerd || echo absent")


@pytest.mark.parametrize("cdi", ["true", "false"])
def test_the_nvidia_part_as_far_as_check_mode(node, tmp_path, cdi):
    """The toolkit's repository is not to be had on every test machine: what would be installed and set is shown."""
    node.set_config({})
    output, changes = node.play(tmp_path, "--check", docker_host_nvidia="true", docker_host_nvidia_cdi=cdi)
    assert "nvidia-container-toolkit=1.19.1-1" in output
    assert ('"cdi": true' in output) == (cdi == "true")
    assert ("native.cgroupdriver=cgroupfs" in output) == (cdi == "false")
    assert node.config() == {}
