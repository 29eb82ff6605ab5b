# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Role litellm from nothing to removal, before a real llama-server. Each test goes on from the one before."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from litellm_lab import LITELLM, LLAMACPP, NASTY, Lab, ansible, chat, docker, free_port, make_images, request

MASTER_KEY = f"sk-{NASTY}master"
NEXT_KEY = f"sk-{NASTY}second"


class Gateway:
    """The role's variables, and the ways to run it."""

    def __init__(self, lab: Lab, directory: Path) -> None:
        self.lab = lab
        self.container = f"{lab.name}-gateway"
        lab.containers += [self.container, f"{self.container}-previous"]
        self.directory = directory / "litellm"
        self.playbook = directory / "playbook.yml"
        self.variables = {
            "ansible_python_interpreter": sys.executable,
            "litellm_container": self.container,
            "litellm_directory": str(self.directory),
            "litellm_image": LITELLM,
            "litellm_port": free_port(),
            "litellm_published_address": "127.0.0.1",
            "litellm_master_key": MASTER_KEY,
            "litellm_environment": {"LLAMACPP_API_KEY": NASTY},
            "litellm_aliases": {"reason": "chat"},
            "litellm_deployments": [
                {
                    "id": "chat",
                    "name": "chat",
                    "model": "chat",
                    "api_base": lab.serve("chat", "chat"),
                    "api_key_env": "LLAMACPP_API_KEY",
                }
            ],
        }
        self.url = f"http://127.0.0.1:{self.variables['litellm_port']}"

    def play(self, *flags: str, tasks_from: str = "main", environment: dict[str, str] | None = None, **other: Any):
        """Run the role with other variables, and return the finished process."""
        role = {"name": "homelab.inference.litellm", "tasks_from": tasks_from}
        play = {
            "hosts": "localhost",
            "connection": "local",
            "gather_facts": False,
            "vars": {name: unsafe(value) for name, value in {**self.variables, **other}.items()},
            "environment": environment or {},
            "tasks": [{"ansible.builtin.include_role": role}],
        }
        self.playbook.write_text(to_yaml([play]))
        return ansible(["ansible-playbook", "--inventory", "localhost,", str(self.playbook), *flags])

    def apply(self, *flags: str, **other: Any) -> set[str]:
        """Run the role, which has to succeed, and return the names of the tasks that changed something."""
        done = self.play(*flags, **other)
        assert done.returncode == 0, done.stdout + done.stderr
        return changed_tasks(done.stdout)

    def started(self) -> str:
        """Which container runs, and since when."""
        return docker("inspect", "--format", "{{.Id}} {{.State.StartedAt}}", self.container)


def to_yaml(value: Any) -> str:
    """JSON, in which a marked string becomes one that Ansible does not take for a template."""
    return re.sub(r'"!unsafe:((?:[^"\\]|\\.)*)"', r'!unsafe "\1"', json.dumps(value))


def unsafe(value: Any) -> Any:
    """Mark every string that holds a brace."""
    if isinstance(value, dict):
        return {name: unsafe(entry) for name, entry in value.items()}
    return f"!unsafe:{value}" if isinstance(value, str) and "{{" in value else value


def changed_tasks(text: str) -> set[str]:
    """The tasks that say that they changed something."""
    found, task = set(), ""
    for line in text.splitlines():
        if line.startswith("TASK ["):
            task = line[6 : line.rindex("]")].split(" : ")[-1]
        elif line.startswith("changed: "):
            found.add(task)
    return found


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    make_images()
    lab = Lab(tmp_path_factory.mktemp("models"), NASTY)
    try:
        yield Gateway(lab, tmp_path_factory.mktemp("gateway"))
    finally:
        lab.close()


COMPARE = "Run | Compare the container with what it should be"
FILES = {"Configure | Make the directory", "Configure | Write the configuration", "Configure | Write the keys"}


def test_a_dry_run_without_docker_names_what_would_be_made(gateway: Gateway) -> None:
    nowhere = {"DOCKER_HOST": "unix:///nowhere/docker.sock"}
    announced = {"Announce the container of a machine that has no Docker yet"}
    assert gateway.apply("--check", "--diff", environment=nowhere) == FILES | announced
    assert gateway.apply("--check", "--diff") == FILES | {COMPARE}
    assert not gateway.directory.exists()
    assert docker("ps", "--all", "--quiet", "--filter", f"name={gateway.container}") == ""


def test_the_gateway_answers_and_gives_no_secret_away(gateway: Gateway) -> None:
    done = gateway.play("-vvv", "--diff")
    assert done.returncode == 0, done.stdout + done.stderr
    assert changed_tasks(done.stdout) == FILES | {COMPARE}
    status, text = chat(gateway.url, MASTER_KEY, "reason")
    assert status == 200, text
    assert chat(gateway.url, "sk-wrong", "chat")[0] in (400, 401, 403)

    pid = docker("inspect", "--format", "{{.State.Pid}}", gateway.container)
    seen = {
        "output": done.stdout + done.stderr,
        "inspect": docker("inspect", gateway.container),
        "arguments": Path(f"/proc/{pid}/cmdline").read_text(),
        "log": subprocess.run(["docker", "logs", gateway.container], capture_output=True, text=True, check=True).stdout,
        "configuration": (gateway.directory / "config.yaml").read_text(),
    }
    for where, what in seen.items():
        for secret in (NASTY, MASTER_KEY, json.dumps(NASTY)[1:-1]):
            assert secret not in what, where
        assert "$HOME$(id)" not in what, where
    keys = gateway.directory / "env"
    assert (keys.stat().st_mode & 0o777, keys.stat().st_uid) == (0o600, 10001)


def test_it_is_hardened(gateway: Gateway) -> None:
    (found,) = json.loads(docker("inspect", gateway.container))
    assert found["Config"]["User"] == "10001:10001"
    assert found["Config"]["Labels"]["homelab.inference.managed"] == "true"
    assert found["HostConfig"]["CapDrop"] == ["ALL"]
    assert found["HostConfig"]["ReadonlyRootfs"] is True
    assert found["HostConfig"]["SecurityOpt"] == ["no-new-privileges:true"]
    assert found["HostConfig"]["Sysctls"] == {"net.ipv4.tcp_syn_retries": "2"}
    assert found["HostConfig"]["RestartPolicy"]["Name"] == "unless-stopped"
    assert "/health/liveliness" in " ".join(found["Config"]["Healthcheck"]["Test"])


def test_a_second_run_changes_nothing(gateway: Gateway) -> None:
    before = gateway.started()
    assert gateway.apply("--check") == set()
    assert gateway.apply() == set()
    assert gateway.started() == before


def test_a_new_key_takes_over(gateway: Gateway) -> None:
    before = gateway.started()
    changes = {"Configure | Write the keys", COMPARE}
    assert gateway.apply("--check", litellm_master_key=NEXT_KEY) == changes
    assert gateway.started() == before
    assert gateway.apply(litellm_master_key=NEXT_KEY) == changes
    gateway.variables["litellm_master_key"] = NEXT_KEY
    assert request(f"{gateway.url}/v1/models", NEXT_KEY)[0] == 200
    assert request(f"{gateway.url}/v1/models", MASTER_KEY)[0] in (400, 401, 403)


def test_what_an_interrupted_run_left_is_made_good(gateway: Gateway) -> None:
    aliases = {"reason": "chat", "fast": "chat"}
    assert gateway.apply(tasks_from="configure", litellm_aliases=aliases) == {"Configure | Write the configuration"}
    assert chat(gateway.url, NEXT_KEY, "fast")[0] == 400

    assert gateway.apply(litellm_aliases=aliases) == {COMPARE}
    gateway.variables["litellm_aliases"] = aliases
    assert chat(gateway.url, NEXT_KEY, "fast")[0] == 200
    assert gateway.apply() == set()


def test_a_container_that_does_not_answer_gives_way_to_the_one_before(gateway: Gateway) -> None:
    name = gateway.started().split()[0]
    files = {path.name: path.read_bytes() for path in gateway.directory.iterdir() if path.is_file()}
    done = gateway.play(litellm_image=LLAMACPP, litellm_ready_timeout=6, litellm_aliases={"other": "chat"})
    assert done.returncode != 0
    assert "litellm: not found" in done.stdout
    assert "The container before runs again, with its files." in done.stdout
    assert gateway.started().split()[0] == name
    assert {path.name: path.read_bytes() for path in gateway.directory.iterdir() if path.is_file()} == files
    assert docker("ps", "--all", "--quiet", "--filter", f"name={gateway.container}-previous") == ""
    assert gateway.apply() == set()
    assert chat(gateway.url, NEXT_KEY, "fast")[0] == 200


def test_a_taken_port_leaves_the_gateway_as_it_was(gateway: Gateway) -> None:
    name = gateway.started().split()[0]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = gateway.play(litellm_port=taken.getsockname()[1])
    assert done.returncode != 0
    assert "The container before runs again" in done.stdout
    assert gateway.started().split()[0] == name
    assert gateway.apply() == set()


def test_bad_input_touches_nothing(gateway: Gateway) -> None:
    before = gateway.started()
    for wrong in (
        {"litellm_master_key": ""},
        {"litellm_master_key": "sk-1234"},
        {"litellm_master_key": "sk-changeme-changeme-changeme"},
        {"litellm_master_key": "no-prefix-0123456789abcdef"},
        {"litellm_environment": {}},
        {"litellm_environment": {"LLAMACPP-API KEY": "x"}},
        {"litellm_fallbacks": {"chat": ["chat"]}},
    ):
        done = gateway.play(**wrong)
        assert done.returncode != 0
        assert "no-prefix" not in done.stdout and "changeme" not in done.stdout
    assert gateway.started() == before


def test_somebody_elses_container_is_left_alone(gateway: Gateway) -> None:
    foreign = gateway.lab.run("foreign", LLAMACPP, "--host", "0.0.0.0", "--port", "8080", "--model", "/none")
    before = docker("inspect", "--format", "{{.Id}}", foreign)
    directory = str(gateway.directory.with_name("foreign"))
    done = gateway.play(litellm_container=foreign, litellm_directory=directory)
    assert done.returncode != 0 and "was not made by this role" in done.stdout
    gateway.apply(tasks_from="remove", litellm_container=foreign, litellm_directory=directory)
    assert docker("inspect", "--format", "{{.Id}}", foreign) == before


def test_removal_leaves_nothing(gateway: Gateway) -> None:
    before = gateway.started()
    gone = {"Remove | Remove those that this role made", "Remove | Remove the files"}
    assert gateway.apply("--check", tasks_from="remove") == gone
    assert gateway.started() == before
    assert gateway.apply(tasks_from="remove") == gone
    assert docker("ps", "--all", "--quiet", "--filter", f"name={gateway.container}") == ""
    assert not gateway.directory.exists()
    assert gateway.apply(tasks_from="remove") == set()
