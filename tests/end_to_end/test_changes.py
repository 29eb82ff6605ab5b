# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A lab lives: models change and leave, nodes fail, the lab is taken off, and what is somebody else's is never touched.

Needs the box (./lab up). The tests follow one another: each leaves the lab as the next expects it, the last as it was
found.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_answers import BOX, INVENTORY, NODES, ROOT, chat, on

from tests.sample import long

FOREIGN = "somebody-elses"
BIN = ROOT / ".cache" / "venv" / "bin"


def playbook(name: str, *words: str, models: dict[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a playbook on the box, with other models than it declares where they are given."""
    command = [str(BIN / "ansible-playbook"), "-i", str(INVENTORY / "lab.yml"), f"playbooks/{name}.yml", *words]
    if models is not None:
        command += ["-e", json.dumps({"lab_models": models})]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "PATH": f"{BIN}:{os.environ['PATH']}"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)


def good(result: subprocess.CompletedProcess[str]) -> str:
    """Return the output of a run that has to succeed."""
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    return result.stdout


def changed(output: str) -> set[tuple[str, str]]:
    """Return the objects that a run reports as changed, as (host, item)."""
    return set(re.findall(r"^changed: \[(\w+)[^\]]*\](?: => \(item=([^)]*)\))?", output, re.MULTILINE))


def answers(node: str) -> None:
    """Wait until a node that was just switched on lets people log in."""
    deadline = time.monotonic() + 90
    while True:
        try:
            on(node, "systemctl is-active docker.service")
            return
        except subprocess.CalledProcessError:
            assert time.monotonic() < deadline, f"{node} does not come back"
            time.sleep(1)


def started(node: str) -> dict[str, str]:
    """Return when each container of a node was started."""
    lines = on(node, "docker ps -aq | xargs -r docker inspect -f '{{.Name}} {{.State.StartedAt}}'").splitlines()
    return dict(line.strip("/").split() for line in lines)


@pytest.fixture(scope="module", autouse=True)
def foreign(models: dict[str, Any], request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Let somebody else's container and daemon.json key be there from before the first run to after the last."""
    image = on(
        "helium",
        "docker ps --filter label=homelab.inference.managed -q | head -n1 | xargs docker inspect -f '{{.Image}}'",
    ).strip()
    on("helium", f"docker run -d --name {FOREIGN} --entrypoint sleep {image} 86400")
    on("helium", "mkdir -p /srv/theirs && echo theirs > /srv/theirs/file")
    yield {"started": started("helium")[FOREIGN]}
    on("helium", f"docker rm -f {FOREIGN}; rm -rf /srv/theirs")
    if request.session.testsfailed:
        good(playbook("plan"))
        good(playbook("site", "-e", "lab_confirm_removal=true"))


def balancer(words: str) -> str:
    """Return what HAProxy answers on its runtime socket."""
    socket = "/var/lib/homelab-inference/haproxy/admin.sock"
    ask = f"c.connect('{socket}'); c.sendall(b'{words}\\n'); print(c.makefile().read())"
    return on("hydrogen", f'python3 -c "import socket as s; c = s.socket(s.AF_UNIX); {ask}"')


def server_states() -> dict[str, str]:
    """Return how HAProxy was told to treat each model server; 0 is as its health says."""
    # Columns: number and name of the backend, number and name of the server, address, operational and own state.
    lines = [line.split() for line in balancer("show servers state").splitlines()]
    return {line[3]: line[6] for line in lines if len(line) > 6 and line[0].isdigit() and ":" not in line[3]}


def recover(*words: str) -> dict[str, Any]:
    """Run recover.yml, which has to end well, and return its report."""
    done = subprocess.run(
        [str(ROOT / "lab"), "recover", *words], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "RECOVERY DONE" in done.stdout
    return json.loads(max((BOX / "lab.reports").glob("*.json")).read_text(encoding="utf-8"))


def unharmed(foreign: dict[str, Any]) -> None:
    """Check that what is somebody else's is as it was."""
    assert started("helium")[FOREIGN] == foreign["started"]
    assert on("helium", "cat /srv/theirs/file") == "theirs\n"


def test_a_changed_declaration_is_not_deployed_by_surprise(models: dict[str, Any], foreign: dict[str, Any]) -> None:
    models["code"]["context"] = 1024
    result = playbook("site", models=models)
    assert result.returncode == 2
    assert "models.code.context was 2048, is 1024" in result.stdout
    assert "Run plan.yml" in result.stdout
    result = playbook("health", models=models)
    assert result.returncode == 2
    assert "was made for another declaration: models.code.context was 2048, is 1024. Run plan.yml" in result.stdout
    unharmed(foreign)


def test_a_change_touches_one_server_and_check_says_which(models: dict[str, Any], foreign: dict[str, Any]) -> None:
    moves = good(playbook("plan", "--diff", models=models))
    assert re.search(r"^-\s+ctx-size: 4096$", moves, re.MULTILINE) and re.search(
        r"^\+\s+ctx-size: 2048$", moves, re.MULTILINE
    )
    before = started("helium") | {f"lithium/{name}": when for name, when in started("lithium").items()}
    foreseen = changed(good(playbook("site", "--check", "--diff", models=models)))
    assert started("helium") | {f"lithium/{name}": when for name, when in started("lithium").items()} == before
    done = changed(good(playbook("site", "--diff", models=models)))
    assert foreseen == done
    after = started("helium") | {f"lithium/{name}": when for name, when in started("lithium").items()}
    assert {name for name in before if before[name] != after[name]} == {"llamacpp-code"}
    unharmed(foreign)


@long
def test_a_model_that_leaves_is_shown_and_goes_and_its_neighbours_stay(
    models: dict[str, Any], foreign: dict[str, Any]
) -> None:
    left = {name: model for name, model in models.items() if name != "code"}
    good(playbook("plan", models=left))
    before = started("helium")
    shown = good(playbook("site", models=left))
    assert re.search(r"GOES AWAY \(its data stays\):\n\s+llamacpp-code on helium", shown)
    after = started("helium")
    assert set(before) - set(after) == {"llamacpp-code"}
    assert all(before[name] == when for name, when in after.items())
    assert "llamacpp-code" not in on("helium", "ls /etc/systemd/system")
    unharmed(foreign)


def test_most_of_the_lab_does_not_go_without_a_word(models: dict[str, Any], foreign: dict[str, Any]) -> None:
    left = {"embed": {**models["embed"], "replicas": 1, "nodes": "helium"}}
    good(playbook("plan", models=left))
    before = started("helium")
    result = playbook("site", models=left)
    assert result.returncode == 2
    assert "lab_confirm_removal=true" in result.stdout
    assert started("helium") == before
    # The next test finds the lock of what is deployed, whichever test that is.
    good(playbook("plan", models=models))
    unharmed(foreign)


@long
def test_a_node_that_is_away_is_named_and_holds_up_nobody(models: dict[str, Any], foreign: dict[str, Any]) -> None:
    good(playbook("plan", models=models))
    subprocess.run(["docker", "stop", "lithium"], check=True, capture_output=True, timeout=120)
    try:
        result = playbook("site", models=models)
        assert result.returncode == 4
        assert re.search(r"^lithium\s+:.*unreachable=1", result.stdout, re.MULTILINE)
        assert re.search(r"^helium\s+:.*unreachable=0\s+failed=0", result.stdout, re.MULTILINE), result.stdout[-4000:]
        assert "llamacpp-code" in started("helium")
        secrets = yaml.safe_load((INVENTORY / "group_vars" / "all" / "secrets.yml").read_text(encoding="utf-8"))
        assert chat(secrets, "chat")[0] == 200
    finally:
        subprocess.run(["docker", "start", "lithium"], check=True, capture_output=True, timeout=120)
        answers("lithium")
    unharmed(foreign)


@pytest.fixture
def guest() -> Iterator[str]:
    """Declare for the time of a test that a node is a guest."""
    variables = INVENTORY / "host_vars" / "lithium.yml"
    variables.parent.mkdir()
    variables.write_text("node_presence: guest\n", encoding="utf-8")
    yield "lithium"
    variables.unlink()
    variables.parent.rmdir()


@long
def test_a_guest_that_is_away_is_no_fault_and_gets_its_share_when_it_is_back(
    models: dict[str, Any], foreign: dict[str, Any], guest: str
) -> None:
    subprocess.run(["docker", "stop", guest], check=True, capture_output=True, timeout=120)
    try:
        models["chat"] |= {"context": 1024, "nodes": ["helium", guest]}
        good(playbook("plan", models=models))
        assert f"{guest}, a guest that is away" in good(playbook("site", models=models))
        assert re.search(r"chat-2\s+AWAY", good(playbook("health", models=models)))
        assert recover()["steps"] == []
    finally:
        subprocess.run(["docker", "start", guest], check=True, capture_output=True, timeout=120)
        answers(guest)
    done = [(one["rung"], one["name"], one["after"]) for one in recover()["steps"]]
    assert ("give what is owed to", guest, "DONE") in done
    for node, name in {"helium": "chat", guest: "chat-2"}.items():
        words = json.loads(on(node, f"docker inspect -f '{{{{json .Args}}}}' llamacpp-{name}"))
        assert words[words.index("--ctx-size") + 1] == "2048", "two slots"
    unharmed(foreign)


@long
def test_an_engine_that_is_down_is_started_by_the_next_run(models: dict[str, Any], foreign: dict[str, Any]) -> None:
    on("lithium", "systemctl stop docker.socket docker.service; systemctl reset-failed docker.service docker.socket")
    good(playbook("site", models=models))
    assert "llamacpp-chat-2" in started("lithium")
    health = good(playbook("health", "-e", "lab_health_file=/tmp/lab-health.json", models=models))
    assert "HEALTHY" in health
    report = json.loads(Path("/tmp/lab-health.json").read_text(encoding="utf-8"))
    Path("/tmp/lab-health.json").unlink()
    assert report["overall"] == "HEALTHY"
    assert set(report["tiers"]) == {"REMOTE", "GATEWAY"}
    unharmed(foreign)


def test_a_gpu_that_is_away_is_drift_and_moves_nothing(models: dict[str, Any], foreign: dict[str, Any]) -> None:
    lock = BOX / "lab.lock.yml"
    before = lock.read_bytes()
    on("helium", "systemctl stop emulated-gpu-1")
    try:
        result = playbook("plan", models=models)
    finally:
        on("helium", "systemctl start emulated-gpu-1")
    good(result)
    assert "DRIFT: gpu1 of helium" in " ".join((result.stdout + result.stderr).split())
    assert lock.read_bytes() == before
    unharmed(foreign)


def test_the_lab_comes_off_and_leaves_what_it_did_not_make(models: dict[str, Any], foreign: dict[str, Any]) -> None:
    good(playbook("remove", models=models))
    for node in NODES:
        assert on(node, "docker ps -aq --filter label=homelab.inference.managed") == ""
        assert on(node, "ls /etc/systemd/system /usr/local/lib | grep -E 'llamacpp|homelab' || true") == ""
        # What the box itself put there is no part of the lab.
        assert on(node, "ls /etc/homelab-inference 2>/dev/null | grep -v emulated-gpus.json || true") == ""
    unharmed(foreign)
    assert not (BOX / "lab.generations").exists(), "recovery would bring it back"
    second = good(playbook("remove", models=models))
    assert changed(second) == set()
    foreseen = good(playbook("site", "--check", "--diff", models=models))
    assert {"(item=chat)", "(item=code)", "(item=embed)", "(item=chat-2)"} <= set(
        re.findall(r"\(item=[^)]*\)", foreseen)
    )
    assert not list(on("helium", "ls /etc/systemd/system | grep llamacpp || true"))
    # As the box declares it.
    good(playbook("plan"))
    good(playbook("site"))
    unharmed(foreign)
