# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Roles haproxy and litellm together: a gateway is changed while clients ask it, and no answer is cut."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from litellm_lab import LITELLM, LLAMACPP, ROOT, Lab, ansible, docker, free_port, request

from tests.bench.load import Load
from tests.integration.test_haproxy_role import HERE, IMAGE, serve
from tests.integration.test_litellm_role import COMPARE, changed_tasks
from tests.sample import long

KEY = "the-key-of-the-servers"
MASTER_KEY = "sk-0123456789abcdef01234567"


class Pair:
    """The variables of both roles, and the ways to run them."""

    def __init__(self, lab: Lab, directory: Path) -> None:
        self.lab = lab
        self.gateway, self.balancer = f"{lab.name}-gateway", f"{lab.name}-haproxy"
        lab.containers += [self.gateway, f"{self.gateway}-previous", self.balancer]
        self.playbook = directory / "playbook.yml"
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        server = {"name": "chat-1", "address": HERE, "port": serve(lab, "chat-1")}
        self.variables: dict[str, Any] = {
            "ansible_python_interpreter": sys.executable,
            "haproxy_image": IMAGE,
            "haproxy_container": self.balancer,
            "haproxy_network": f"{lab.name}-net",
            "haproxy_directory": str(directory / "etc"),
            "haproxy_socket_directory": str(directory / "run"),
            "haproxy_gateway": self.gateway,
            "haproxy_gateway_port": port,
            "haproxy_gateway_address": "127.0.0.1",
            "haproxy_models": [{"name": "chat", "servers": [server]}],
            "litellm_container": self.gateway,
            "litellm_directory": str(directory / "litellm"),
            "litellm_image": LITELLM,
            "litellm_network": f"{lab.name}-net",
            "litellm_balancer_socket": str(directory / "run" / "admin.sock"),
            "litellm_master_key": MASTER_KEY,
            "litellm_environment": {"LLAMACPP_API_KEY": KEY},
            "litellm_deployments": [self.deployment("chat")],
        }

    def deployment(self, name: str) -> dict[str, str]:
        """The model behind the balancer, under a name."""
        base = f"http://{self.balancer}:8080/chat"
        return {"id": name, "name": name, "model": "chat", "api_base": base, "api_key_env": "LLAMACPP_API_KEY"}

    def play(self, *flags: str, **other: Any) -> subprocess.CompletedProcess[str]:
        """Run both roles with other variables, and return the finished process."""
        play = {
            "hosts": "localhost",
            "connection": "local",
            "gather_facts": False,
            "vars": {**self.variables, **other},
            "roles": ["homelab.inference.haproxy", "homelab.inference.litellm"],
        }
        self.playbook.write_text(json.dumps([play]))
        return ansible(["ansible-playbook", "--inventory", "localhost,", str(self.playbook), *flags])

    def apply(self, *flags: str, **other: Any) -> set[str]:
        """Run both roles, which have to succeed, and return the names of the tasks that changed something."""
        done = self.play(*flags, **other)
        assert done.returncode == 0, done.stdout + done.stderr
        return changed_tasks(done.stdout)

    def load(self) -> Load:
        """Clients that ask for the model without a pause."""
        return Load(self.url, MASTER_KEY, {"chat": {"chat"}}, clients=3)

    def gateways(self) -> dict[str, str]:
        """The gateway's containers: of each the name, and its id."""
        lines = docker(
            "ps", "--all", "--no-trunc", "--filter", f"name={self.gateway}", "--format", "{{.Names}} {{.ID}}"
        )
        return dict(line.split() for line in lines.splitlines())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    for folder, image in (("llama.cpp", LLAMACPP), ("haproxy", IMAGE), ("litellm", LITELLM)):
        subprocess.run([ROOT / "tests" / "images" / folder / "build", image], check=True)
    lab = Lab(tmp_path_factory.mktemp("models"), KEY)
    try:
        yield Pair(lab, tmp_path_factory.mktemp("pair"))
    finally:
        lab.close()
        docker("network", "rm", f"{lab.name}-net", check=False)


def test_the_balancer_alone_opens_the_port(pair: Pair) -> None:
    assert COMPARE in pair.apply()
    assert pair.load().run(requests=12).failures == []
    ports = "{{json .HostConfig.PortBindings}}"
    assert docker("inspect", "--format", ports, pair.gateway) == "{}"
    assert list(json.loads(docker("inspect", "--format", ports, pair.balancer))) == ["4000/tcp"]
    assert pair.apply() == set()


def test_models_come_and_go_while_clients_ask(pair: Pair) -> None:
    load = pair.load()
    load.start()
    try:
        before = pair.gateways()
        pair.apply(litellm_deployments=[pair.deployment("chat"), pair.deployment("other")])
        after = pair.gateways()
        assert set(before) == set(after) == {pair.gateway} and before != after
        assert "other" in request(f"{pair.url}/v1/models", MASTER_KEY)[1]
        pair.apply()
        assert "other" not in request(f"{pair.url}/v1/models", MASTER_KEY)[1]
    finally:
        found = load.stop()
    assert found.requests > 20
    assert found.failures == []


@long
def test_the_one_before_answers_on_when_the_new_one_does_not(pair: Pair) -> None:
    before = pair.gateways()
    load = pair.load()
    load.start()
    try:
        done = pair.play(litellm_image=IMAGE, litellm_ready_timeout=6)
        assert done.returncode != 0
        assert "The container before runs again" in done.stdout
    finally:
        found = load.stop()
    assert found.failures == []
    assert pair.gateways() == before


@long
def test_what_an_interrupted_run_left_is_made_good(pair: Pair) -> None:
    before = pair.gateways()
    docker("rename", pair.gateway, f"{pair.gateway}-previous")
    load = pair.load()
    load.start()
    try:
        assert COMPARE in pair.apply()
    finally:
        found = load.stop()
    assert found.failures == []
    after = pair.gateways()
    assert set(after) == {pair.gateway} and after != before
    assert pair.apply() == set()
