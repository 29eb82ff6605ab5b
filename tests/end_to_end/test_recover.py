# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Real things are broken, and recover.yml repairs them by the cheapest step that works.

Needs the box (./lab up), and leaves it as it was.
"""

from __future__ import annotations

import copy
import datetime
import subprocess
import time
from typing import Any

import yaml
from test_answers import BOX, GATEWAY, INVENTORY, LAB, ROOT, ask, chat, on
from test_changes import answers, balancer, good, playbook, recover, server_states

from tests.sample import long


def rungs(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return what was done: repair, name, and how it was after that."""
    return [(step["rung"], step["name"], step["after"]) for step in report["steps"]]


def container(node: str) -> str:
    """Return the name of the container with a node's embedding model."""
    return on(node, "docker ps --all --format '{{.Names}}' --filter name=llamacpp-embed").strip()


def state(node: str, name: str, what: str) -> str:
    """Return a value of the state of a container."""
    return on(node, f"docker inspect -f '{{{{.State.{what}}}}}' {name}").strip()


def test_where_nothing_is_broken_nothing_is_done() -> None:
    name = container("lithium")
    before = state("lithium", name, "StartedAt")
    report = recover("-e", "recover_node=lithium")
    assert (report["found"], report["steps"], report["node"]) == ([], [], "lithium")
    assert state("lithium", name, "StartedAt") == before


def test_two_nodes_at_once_a_server_stopped_by_hand_and_a_container_gone() -> None:
    stopped, gone = container("helium"), container("lithium")
    on("helium", f"systemctl stop {stopped}.service")
    on("lithium", f"systemctl stop {gone}.service; docker rm --force {gone}")
    done = rungs(recover())
    assert ("restart", stopped.removeprefix("llamacpp-"), "HEALTHY") in done
    assert ("recreate", gone.removeprefix("llamacpp-"), "HEALTHY") in done


def test_a_server_that_hangs_is_ended_and_a_gateway_that_was_stopped_answers_again() -> None:
    name = container("lithium")
    on("lithium", f"kill -STOP {state('lithium', name, 'Pid')}")
    on("hydrogen", "docker stop litellm")
    assert ask(f"{GATEWAY}/health/liveliness", None, timeout=10)[0] != 200
    report = recover()
    assert sorted(one["state"] for one in report["found"]) == ["DEGRADED", "HUNG"]
    done = rungs(report)
    assert ("kill", name.removeprefix("llamacpp-"), "HEALTHY") in done
    assert ("restart", "the gateway", "HEALTHY") in done
    assert ask(f"{GATEWAY}/health/liveliness", None, timeout=10)[0] == 200


def test_an_engine_that_hangs_is_restarted_and_its_other_servers_live_on() -> None:
    other = on("lithium", "docker ps --format '{{.Names}}' --filter name=llamacpp-chat").strip()
    name, lives_on = container("lithium"), state("lithium", other, "Pid")
    pid = state("lithium", name, "Pid")
    on("lithium", f"kill -9 {pid}; systemctl kill --kill-whom=main --signal=SIGSTOP docker.service")
    done = rungs(recover())
    assert done[0] == ("restart the engine of", "lithium", "UP")
    assert state("lithium", name, "Running") == "true"
    assert state("lithium", other, "Pid") == lives_on


@long
def test_a_damaged_model_file_that_looks_as_before_is_fetched_again() -> None:
    name = container("lithium")
    folders = on("lithium", "docker inspect -f '{{range .Mounts}}{{.Source}} {{end}}' " + name).split()
    (path,) = on("lithium", f"find {' '.join(folders)} -name '*.gguf'").split()
    on("lithium", f"systemctl stop {name}.service; touch -r {path} /tmp/before")
    on("lithium", f"dd if=/dev/zero of={path} bs=64 count=1 conv=notrunc; touch -r /tmp/before {path}; rm /tmp/before")
    done = rungs(recover())
    assert done[-1] == ("fetch", name.removeprefix("llamacpp-"), "HEALTHY")


@long
def test_what_a_dead_node_had_runs_elsewhere_until_it_is_taken_back() -> None:
    models = copy.deepcopy(LAB["lab_models"])
    models["code"]["source"] = {"file": str(BOX / "models" / "code.gguf")}
    models["embed"]["source"] = {"file": str(BOX / "models" / "embed.gguf")}
    secrets = yaml.safe_load((INVENTORY / "group_vars" / "all" / "secrets.yml").read_text(encoding="utf-8"))

    def code() -> str:
        status, _answer, headers = chat(secrets, "code")
        assert status == 200
        return (
            "chat" if any("fallback" in name and value not in ("", "0") for name, value in headers.items()) else "code"
        )

    good(playbook("plan", models=models))
    good(playbook("site", models=models))
    assert "llamacpp-code" in on("helium", "docker ps --format '{{.Names}}'").split()
    subprocess.run(["docker", "stop", "helium"], check=True, capture_output=True, timeout=120)
    try:
        done = subprocess.run([str(ROOT / "lab"), "recover"], capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 2, done.stdout[-4000:]
        assert "helium does not answer over SSH" in done.stdout
        assert "moved  code runs on lithium instead of helium" in done.stdout, done.stdout[-4000:]
        assert "llamacpp-code-2" in on("lithium", "docker ps --format '{{.Names}}'").split()
        assert code() == "code"
    finally:
        subprocess.run(["docker", "start", "helium"], check=True, capture_output=True, timeout=120)
        answers("helium")
    shown = good(playbook("site", models=models))
    assert "code runs on lithium instead of helium" in shown
    assert "llamacpp-code" not in on("helium", "docker ps --all --format '{{.Names}}'").split()
    assert code() == "code"
    good(playbook("site", "-e", "lab_take_back=true", models=models))
    assert "llamacpp-code-2" not in on("lithium", "docker ps --all --format '{{.Names}}'").split()
    assert "llamacpp-code" in on("helium", "docker ps --format '{{.Names}}'").split()
    assert code() == "code"
    good(playbook("plan"))
    good(playbook("site"))


def test_after_a_restart_of_its_engine_the_gateway_is_still_found_by_name() -> None:
    """HAProxy asks the engine for it, whose name server listens elsewhere then."""
    on("hydrogen", "systemctl reset-failed docker.service docker.socket; systemctl restart docker.service")
    on("hydrogen", "docker rename litellm litellm-previous")
    try:
        assert found("gateway:previous")
        assert ask(f"{GATEWAY}/health/liveliness", None, timeout=10)[0] == 200
    finally:
        on("hydrogen", "docker rename litellm-previous litellm")
    assert found("gateway:current")


def found(server: str) -> bool:
    """Wait until HAProxy has an address for one of its servers and finds it well."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        lines = [line.split() for line in balancer("show servers state gateway:").splitlines()]
        if [server, "2", "0"] in [[line[3], line[5], line[6]] for line in lines if len(line) > 6]:
            return True
        time.sleep(1)
    return False


def test_a_node_in_maintenance_gets_no_requests_and_no_repairs_until_its_time_is_over() -> None:
    name = container("lithium")
    good(playbook("maintenance", "-l", "lithium", "-e", "for=1h"))
    try:
        assert drained() == {"chat-2", "embed-2"}
        on("lithium", f"systemctl stop {name}.service")
        assert "AWAY" in good(playbook("health"))
        assert recover()["steps"] == []
        assert state("lithium", name, "Running") == "false"
    finally:
        ends = good(playbook("maintenance", "-l", "lithium", "-e", "for=2s"))
    assert "lithium: in maintenance until " in ends
    deadline = time.monotonic() + 60
    while drained() and time.monotonic() < deadline:
        time.sleep(1)
    assert drained() == set()
    assert ("restart", name.removeprefix("llamacpp-"), "HEALTHY") in rungs(recover())


def drained() -> set[str]:
    """Return the names of the servers that get no requests."""
    return {name for name, own in server_states().items() if own != "0"}


def test_a_node_that_boots_starts_its_servers_in_order_and_never_two_on_gpus_at_once() -> None:
    lock = yaml.safe_load((BOX / "lab.lock.yml").read_text(encoding="utf-8"))
    planned = sorted((one for one in lock["instances"] if one["node"] == "helium"), key=lambda one: one["start"])
    on_gpus = [f"llamacpp-{one['name']}" for one in planned if one["devices"]]
    assert len(on_gpus) > 1
    subprocess.run(["docker", "restart", "helium"], check=True, capture_output=True, timeout=120)
    answers("helium")
    units = " ".join(f"llamacpp-{one['name']}.service" for one in planned)
    deadline = time.monotonic() + 300
    while "HEALTHY" not in (asked := playbook("health").stdout).split("Overall: ")[1].splitlines()[0]:
        assert time.monotonic() < deadline, asked
    shown = on("helium", f"systemctl show --timestamp=us+utc -p ActiveEnterTimestamp --value {units}").split("\n\n")
    up = {f"llamacpp-{one['name']}": moment(text) for one, text in zip(planned, shown)}
    began = {name: moment(state("helium", name, "StartedAt")) for name in on_gpus}
    assert on_gpus == sorted(on_gpus, key=lambda name: began[name]), "in the order of the plan"
    for before, after in zip(on_gpus, on_gpus[1:]):
        assert up[before] <= began[after], "one was ready before the next began"


def moment(text: str) -> datetime.datetime:
    """Read the time of Docker (2026-01-31T12:00:00.123456789Z), systemd (Sat 2026-01-31 12:00:00.123456 UTC)."""
    words = text.strip().removesuffix("Z").removesuffix(" UTC").replace("T", " ").split()[-2:]
    return datetime.datetime.fromisoformat(f"{words[0]} {words[1][:15]}")
