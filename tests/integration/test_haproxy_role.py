# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Role haproxy from nothing to removal, before real llama-servers. Each test goes on from the one before."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from litellm_lab import LLAMACPP, ROOT, Lab, ansible, docker, free_port, request, wait_for

from tests.bench.load import Load
from tests.integration.test_litellm_role import changed_tasks

IMAGE = "homelab-inference/haproxy:dev"
KEY = "the-key-of-the-servers"
# Where containers of any network reach what this machine publishes.
HERE = "172.17.0.1"

CONFIG = "Configure | Write the configuration"
DIRECTORIES = "Configure | Make the directories"
RELOAD = "Run | Start a new worker"
RUN = "Run | Run the container"
NETWORK = "Run | Make the network"


def serve(lab: Lab, name: str) -> int:
    """Start a llama-server and return the port it is published on."""
    port = free_port()
    lab.run(
        name,
        *("--volume", f"{lab.directory}:/models:ro", "--publish", f"{HERE}:{port}:8080", LLAMACPP),
        *("--host", "0.0.0.0", "--port", "8080", "--model", "/models/chat.gguf", "--alias", "chat"),
        *("--api-key-file", "/models/api-key", "--ctx-size", "8192", "--parallel", "8", "--threads", "1"),
        "--metrics",
    )
    wait_for(f"http://{HERE}:{port}/health", 60)
    return port


class Balancer:
    """The role's variables, and the ways to run it."""

    def __init__(self, lab: Lab, directory: Path) -> None:
        self.lab = lab
        self.container = f"{lab.name}-haproxy"
        self.network = f"{lab.name}-net"
        lab.containers.append(self.container)
        self.directory = directory
        self.servers = [{"name": name, "address": HERE, "port": serve(lab, name)} for name in ("chat-1", "chat-2")]
        self.variables: dict[str, Any] = {
            "ansible_python_interpreter": sys.executable,
            "haproxy_image": IMAGE,
            "haproxy_container": self.container,
            "haproxy_network": self.network,
            "haproxy_directory": str(directory / "etc"),
            "haproxy_socket_directory": str(directory / "run"),
            "haproxy_models": [{"name": "chat", "servers": self.servers}, {"name": "away", "servers": []}],
        }

    def play(self, *flags: str, tasks_from: str = "main", **other: Any) -> subprocess.CompletedProcess[str]:
        """Run the role with other variables, and return the finished process."""
        role = {"name": "homelab.inference.haproxy", "tasks_from": tasks_from}
        play = {
            "hosts": "localhost",
            "connection": "local",
            "gather_facts": False,
            "vars": {**self.variables, **other},
            "tasks": [{"ansible.builtin.include_role": role}],
        }
        (self.directory / "playbook.yml").write_text(json.dumps([play]))
        return ansible(["ansible-playbook", "--inventory", "localhost,", str(self.directory / "playbook.yml"), *flags])

    def apply(self, *flags: str, **other: Any) -> set[str]:
        """Run the role, which has to succeed, and return the names of the tasks that changed something."""
        done = self.play(*flags, **other)
        assert done.returncode == 0, done.stdout + done.stderr
        # Those are about machines with systemd, which this one may be.
        return {name for name in changed_tasks(done.stdout) if not name.startswith("Names | ")}

    def turn(self, server: str, state: str) -> None:
        """Drain a server or take it back, as the playbooks do it."""
        words = f"state={state} host={server} wait=true drain={'true' if state == 'drain' else 'false'} wait_interval=1"
        done = ansible(
            [
                *("ansible", "localhost", "--inventory", "localhost,", "--connection", "local"),
                *("--extra-vars", f"ansible_python_interpreter={sys.executable}"),
                *("--module-name", "community.general.haproxy"),
                *("--args", f"{words} wait_retries=60 socket={self.directory}/run/admin.sock"),
            ]
        )
        assert done.returncode == 0, done.stdout + done.stderr

    @property
    def url(self) -> str:
        """Where it is reached on its network."""
        show = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
        return f"http://{docker('inspect', '--format', show, self.container)}:8080"

    def load(self) -> Load:
        """Clients that ask for the model without a pause."""
        return Load(f"{self.url}/chat", KEY, {"chat": {"chat"}}, clients=2)

    def started(self) -> str:
        """Which container runs, and since when."""
        return docker("inspect", "--format", "{{.Id}} {{.State.StartedAt}}", self.container)


@pytest.fixture(scope="module")
def balancer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Balancer]:
    subprocess.run([ROOT / "tests/images/llama.cpp/build", LLAMACPP], check=True)
    subprocess.run([ROOT / "tests/images/haproxy/build", IMAGE], check=True)
    lab = Lab(tmp_path_factory.mktemp("models"), KEY)
    try:
        yield Balancer(lab, tmp_path_factory.mktemp("haproxy"))
    finally:
        lab.close()
        docker("network", "rm", f"{lab.name}-net", check=False)


def test_a_dry_run_names_what_would_be_made(balancer: Balancer) -> None:
    assert balancer.apply("--check", "--diff") == {DIRECTORIES, CONFIG, NETWORK, RUN}
    assert not (balancer.directory / "etc").exists()
    assert docker("ps", "--all", "--quiet", "--filter", f"name={balancer.container}") == ""


def test_every_server_answers_behind_one_address(balancer: Balancer) -> None:
    assert balancer.apply() == {DIRECTORIES, CONFIG, NETWORK, RUN}
    found = balancer.load().run(requests=40)
    assert found.failures == []
    for server in balancer.servers:
        metrics = request(f"http://{HERE}:{server['port']}/metrics", KEY)[1]
        assert float(metrics.split("\nllamacpp:tokens_predicted_total ")[1].split()[0]) > 0, server


def test_a_model_without_a_server_is_refused_at_once(balancer: Balancer) -> None:
    began = time.monotonic()
    assert request(f"{balancer.url}/away/v1/models", KEY)[0] == 503
    assert request(f"{balancer.url}/unknown/v1/models", KEY)[0] == 503
    assert time.monotonic() - began < 3


def test_it_is_hardened_and_opens_no_port_of_the_node(balancer: Balancer) -> None:
    (found,) = json.loads(docker("inspect", balancer.container))
    assert found["Config"]["User"] == "10002:10002"
    assert found["HostConfig"]["CapDrop"] == ["ALL"]
    assert found["HostConfig"]["ReadonlyRootfs"] is True
    assert found["HostConfig"]["SecurityOpt"] == ["no-new-privileges:true"]
    assert not found["HostConfig"]["PortBindings"]
    socket = balancer.directory / "run" / "admin.sock"
    assert (socket.stat().st_mode & 0o777, socket.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_a_second_run_changes_nothing(balancer: Balancer) -> None:
    before = balancer.started()
    assert balancer.apply("--check") == set()
    assert balancer.apply() == set()
    assert balancer.started() == before


def test_servers_are_restarted_one_by_one_and_nobody_notices(balancer: Balancer) -> None:
    load = balancer.load()
    load.start()
    try:
        for server in balancer.servers:
            balancer.turn(server["name"], "drain")
            docker("restart", f"{balancer.lab.name}-{server['name']}")
            wait_for(f"http://{HERE}:{server['port']}/health", 60)
            balancer.turn(server["name"], "enabled")
    finally:
        found = load.stop()
    assert found.requests > 20
    assert found.failures == []


def test_the_same_without_draining_loses_requests(balancer: Balancer) -> None:
    """The control: if this were lossless, the test above would prove nothing."""
    load = balancer.load()
    load.start()
    try:
        for server in balancer.servers:
            time.sleep(1)
            docker("restart", "--time", "0", f"{balancer.lab.name}-{server['name']}")
            wait_for(f"http://{HERE}:{server['port']}/health", 60)
    finally:
        found = load.stop()
    assert found.failures


def test_a_change_cuts_no_stream(balancer: Balancer) -> None:
    before = balancer.started()
    load = balancer.load()
    load.start()
    try:
        for models in ([balancer.servers[0]], balancer.servers):
            time.sleep(1)
            changed = balancer.apply(haproxy_models=[{"name": "chat", "servers": models}])
            assert changed == {CONFIG, RELOAD}
    finally:
        found = load.stop()
    assert found.failures == []
    assert balancer.started() == before
    balancer.variables["haproxy_models"] = [{"name": "chat", "servers": balancer.servers}]


def test_what_an_interrupted_run_left_is_made_good(balancer: Balancer) -> None:
    more = [*balancer.variables["haproxy_models"], {"name": "code", "servers": balancer.servers}]
    assert balancer.apply(tasks_from="configure", haproxy_models=more) == {CONFIG}
    assert request(f"{balancer.url}/code/v1/models", KEY)[0] == 503
    assert balancer.apply(haproxy_models=more) == {RELOAD}
    time.sleep(1)  # the new worker asks each server first
    assert request(f"{balancer.url}/code/v1/models", KEY)[0] == 200
    balancer.variables["haproxy_models"] = more


def test_a_server_that_was_left_drained_gets_requests_again(balancer: Balancer) -> None:
    balancer.turn("chat-1", "drain")
    assert 'server="chat-1",state="DRAIN"} 1' in request(f"{balancer.url}/metrics", KEY)[1]
    assert balancer.apply() == set()
    assert 'server="chat-1",state="DRAIN"} 1' not in request(f"{balancer.url}/metrics", KEY)[1]


def test_a_configuration_that_haproxy_refuses_does_not_replace_one_that_works(balancer: Balancer) -> None:
    path = balancer.directory / "etc" / "haproxy.cfg"
    before = path.read_text()
    done = balancer.play(haproxy_models=[{"name": "not a name", "servers": balancer.servers}])
    assert done.returncode != 0
    assert "'backend' cannot handle unexpected argument" in done.stdout
    assert path.read_text() == before
    assert request(f"{balancer.url}/chat/v1/models", KEY)[0] == 200


def test_a_container_of_somebody_else_is_left_alone(balancer: Balancer) -> None:
    other = balancer.lab.run("other", "--entrypoint", "sleep", LLAMACPP, "600")
    before = docker("inspect", "--format", "{{.State.StartedAt}}", other)
    done = balancer.play(haproxy_container=other)
    assert done.returncode != 0
    assert f"container {other} on localhost was not made by this role" in done.stdout
    assert balancer.play(tasks_from="remove", haproxy_container=other, haproxy_network="none-such").returncode == 0
    assert docker("inspect", "--format", "{{.State.StartedAt}}", other) == before


def test_removal_leaves_nothing(balancer: Balancer) -> None:
    # The test before took the files.
    balancer.apply()
    balancer.apply(tasks_from="remove")
    assert docker("ps", "--all", "--quiet", "--filter", f"name={balancer.container}") == ""
    assert docker("network", "ls", "--quiet", "--filter", f"name={balancer.network}") == ""
    assert not (balancer.directory / "etc").exists()
    assert not (balancer.directory / "run").exists()
    assert balancer.apply(tasks_from="remove") == set()
