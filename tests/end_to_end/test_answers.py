# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab answers: through the real gateway, from the server that is meant, from its stand-in when that server is down.

Needs the box (./lab up). Everything here asks the way a client does, and looks at the nodes over SSH.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
BOX = ROOT / ".cache" / "box"
INVENTORY = ROOT / "inventories" / "box"
NODES = {"hydrogen": "172.30.99.11", "helium": "172.30.99.12", "lithium": "172.30.99.13"}
GATEWAY = f"http://{NODES['hydrogen']}:4000"
LAB = yaml.safe_load((INVENTORY / "lab.yml").read_text(encoding="utf-8"))["all"]["vars"]


@pytest.fixture(scope="module")
def secrets() -> dict[str, str]:
    """Return the lab's generated secrets."""
    return yaml.safe_load((INVENTORY / "group_vars" / "all" / "secrets.yml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def lock() -> dict[str, Any]:
    """Return the box's lock."""
    return yaml.safe_load((BOX / "lab.lock.yml").read_text(encoding="utf-8"))


def ask(
    url: str, key: str | None, body: dict[str, Any] | None = None, timeout: float = 60
) -> tuple[int, Any, dict[str, str]]:
    """Send one request; return status, body and headers."""
    request = urllib.request.Request(
        url, data=json.dumps(body).encode() if body else None, headers={"Content-Type": "application/json"}
    )
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            text = response.read().decode()
            return response.status, json.loads(text) if text.startswith("{") else text, dict(response.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), dict(error.headers)


def chat(secrets: dict[str, str], model: str) -> tuple[int, Any, dict[str, str]]:
    """Ask the gateway a question."""
    body = {"model": model, "max_tokens": 8, "messages": [{"role": "user", "content": "How are you?"}]}
    return ask(f"{GATEWAY}/v1/chat/completions", secrets["lab_secret_litellm_master_key"], body)


def on(node: str, command: str) -> str:
    """Run a command on a node as root; return what it prints."""
    ssh = [
        "ssh",
        "-i",
        str(BOX / "ssh" / "id_ed25519"),
        "-o",
        f"UserKnownHostsFile={BOX / 'ssh' / 'known_hosts'}",
        "-o",
        "BatchMode=yes",
    ]
    words = [*ssh, f"lab@{NODES[node]}", f"sudo sh -c {json.dumps(command)}"]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=True).stdout


def predicted(instance: dict[str, Any], secrets: dict[str, str]) -> float:
    """Return how many tokens a server has predicted so far."""
    _status, text, _headers = ask(
        f"http://{NODES[instance['node']]}:{instance['port']}/metrics", secrets["lab_secret_llamacpp_api_key"]
    )
    return float(re.search(r"^llamacpp:tokens_predicted_total (\S+)", text, re.MULTILINE).group(1))


def servers(lock: dict[str, Any], model: str) -> list[dict[str, Any]]:
    """Return the instances of a model."""
    return [instance for instance in lock["instances"] if instance["model"] == model]


def test_a_question_is_answered_by_the_server_that_is_meant(lock: dict[str, Any], secrets: dict[str, str]) -> None:
    (server,) = servers(lock, "code")
    before = predicted(server, secrets)
    status, answer, _headers = chat(secrets, "code")
    assert status == 200
    assert answer["usage"]["completion_tokens"] > 0
    assert predicted(server, secrets) >= before + answer["usage"]["completion_tokens"]


def test_the_emulated_gpus_hold_the_layers(lock: dict[str, Any]) -> None:
    (server,) = servers(lock, "code")
    assert server["devices"]
    log = on(server["node"], f"docker logs llamacpp-{server['name']} 2>&1 | grep -E 'offloaded [0-9]+/[0-9]+ layers'")
    offloaded, layers = re.search(r"offloaded (\d+)/(\d+) layers", log).groups()
    assert offloaded == layers != "0"


def test_every_replica_of_an_embedding_model_gives_a_vector(lock: dict[str, Any], secrets: dict[str, str]) -> None:
    assert {server["node"] for server in servers(lock, "embed")} == {"helium", "lithium"}
    body = {"model": "embed", "input": "a sentence"}
    status, answer, _headers = ask(f"{GATEWAY}/v1/embeddings", secrets["lab_secret_litellm_master_key"], body)
    assert status == 200
    assert len(answer["data"][0]["embedding"]) > 8


def test_when_a_server_is_down_its_fallback_answers(lock: dict[str, Any], secrets: dict[str, str]) -> None:
    (server,) = servers(lock, "code")
    unit = f"llamacpp-{server['name']}.service"
    before = sum(predicted(one, secrets) for one in servers(lock, "chat"))
    on(server["node"], f"systemctl stop {unit}")
    try:
        status, answer, _headers = chat(secrets, "code")
        assert status == 200
        assert (
            sum(predicted(one, secrets) for one in servers(lock, "chat"))
            >= before + answer["usage"]["completion_tokens"]
            > before
        )
    finally:
        on(server["node"], f"systemctl start {unit}")
    deadline = time.monotonic() + 60
    while chat(secrets, "code")[0] != 200 or predicted(server, secrets) == 0:
        assert time.monotonic() < deadline, "the server did not come back"
        time.sleep(1)


@pytest.mark.parametrize("key", [None, "sk-wrong-key-0000000000000000"])
def test_nobody_is_answered_without_the_key(key: str | None, lock: dict[str, Any]) -> None:
    body = {"model": "chat", "messages": [{"role": "user", "content": "x"}]}
    assert ask(f"{GATEWAY}/v1/chat/completions", key, body)[0] in (400, 401)
    for server in lock["instances"]:
        url = f"http://{NODES[server['node']]}:{server['port']}"
        assert ask(f"{url}/v1/models", key)[0] == 401
        assert ask(f"{url}/health", None)[0] == 200


def test_no_secret_is_seen_on_a_node(secrets: dict[str, str]) -> None:
    for node in NODES:
        seen = on(
            node,
            "ps axww -o args; docker ps -aq | xargs -r docker inspect; "
            "docker ps -aq | xargs -r -n1 docker logs 2>&1; journalctl --no-pager -q",
        )
        assert len(seen) > 1000
        for name, value in secrets.items():
            assert value not in seen, f"{name} is seen on {node}"
        for path in on(node, "find /etc/homelab-inference -type f").split():
            if any(value in on(node, f"cat {path}") for value in secrets.values()):
                assert on(node, f"stat -c %a {path}").strip() == "600", path


def test_no_secret_is_seen_in_the_loudest_run(secrets: dict[str, str]) -> None:
    words = [str(ROOT / "lab"), "site", "-vvv", "--diff"]
    result = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stdout[-3000:]
    for name, value in secrets.items():
        assert value not in result.stdout + result.stderr, f"{name} is printed"


def test_servers_run_the_images_that_the_lock_names_by_digest(lock: dict[str, Any]) -> None:
    assert len(lock["digests"]) == 3 and all(digest.startswith("sha256:") for digest in lock["digests"].values())
    for node in NODES:
        images = on(
            node, "docker ps --filter label=homelab.inference.managed -q | xargs docker inspect -f '{{.Config.Image}}'"
        )
        assert images.split() and all(image.partition("@")[2] in lock["digests"].values() for image in images.split())


def test_a_second_run_by_name_from_an_empty_directory_changes_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(ROOT / ".cache")}
    environment.pop("ANSIBLE_CONFIG", None)
    program = str(ROOT / ".cache" / "venv" / "bin" / "ansible-playbook")
    words = [program, "-i", str(INVENTORY / "lab.yml"), "homelab.inference.site"]
    result = subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:]
    changed = re.findall(r"^(\w+)\s*: ok=\d+\s+changed=(\d+)", result.stdout, re.MULTILINE)
    assert {host for host, _count in changed} >= set(NODES)
    assert all(count == "0" for _host, count in changed), result.stdout[-3000:]
