# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Real things are broken, and recover.yml repairs them by the cheapest step that works.

Needs the box (./lab up), and leaves it as it was.
"""

from __future__ import annotations

import json
import subprocess
from typing import Any

from test_answers import BOX, GATEWAY, ROOT, ask, on

REPORTS = BOX / "lab.reports"
WELL = "RECOVERY DONE"


def recover(*words: str) -> dict[str, Any]:
    """Run recover.yml, which has to end well, and return its report."""
    done = subprocess.run(
        [str(ROOT / "lab"), "recover", *words], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert WELL in done.stdout
    return json.loads(max(REPORTS.glob("*.json")).read_text(encoding="utf-8"))


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


def test_a_damaged_model_file_that_looks_as_before_is_fetched_again() -> None:
    name = container("lithium")
    folders = on("lithium", "docker inspect -f '{{range .Mounts}}{{.Source}} {{end}}' " + name).split()
    (path,) = on("lithium", f"find {' '.join(folders)} -name '*.gguf'").split()
    on("lithium", f"systemctl stop {name}.service; touch -r {path} /tmp/before")
    on("lithium", f"dd if=/dev/zero of={path} bs=64 count=1 conv=notrunc; touch -r /tmp/before {path}; rm /tmp/before")
    done = rungs(recover())
    assert done[-1] == ("fetch", name.removeprefix("llamacpp-"), "HEALTHY")
