# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab is watched and repairs itself: real faults, nobody who types anything. Not declared any more, all that goes.

Needs the box (./lab up), and leaves it as it was. `./lab break` is the whole table; this is a sample of it.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from test_answers import BOX, NODES, ROOT, on
from test_changes import changed, good, playbook

from tests.sample import long

pytestmark = long
WATCHED = ["-e", f"@{ROOT / 'tests/faults/watched.yml'}"]
KEY = "homelab-inference controller"


@pytest.fixture(scope="module")
def results() -> Iterator[dict[str, dict[str, Any]]]:
    """Break two things, one that is down and one that hangs; return what was seen, by fault."""
    words = [str(ROOT / "lab"), "--yes", "break", "container-stopped", "engine-hung"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    yield {one["name"]: one for one in json.loads((BOX / "faults.json").read_text(encoding="utf-8"))}
    (BOX / "watched").unlink()
    good(playbook("plan"))
    good(playbook("site"))


@pytest.mark.parametrize(
    ("fault", "step"),
    [("container-stopped", "restart embed-2: HEALTHY"), ("engine-hung", "restart the engine of lithium: UP")],
)
def test_a_fault_is_noticed_and_repaired_by_the_control_node(
    results: dict[str, dict[str, Any]], fault: str, step: str
) -> None:
    seen = results[fault]
    assert seen["healthy"] and step in seen["steps"]
    assert seen["detection"] is not None
    assert seen["failed"]["gateway"].startswith("0 of ")


def test_a_second_run_changes_nothing(results: dict[str, dict[str, Any]]) -> None:
    assert changed(good(playbook("site", *WATCHED))) == set()


def test_the_secret_of_the_door_is_seen_nowhere(results: dict[str, dict[str, Any]]) -> None:
    secret = json.loads(on("hydrogen", "cat /etc/homelab-inference/healer-hooks.json"))[0]["trigger-rule"]["match"][
        "value"
    ]
    secret = secret.removeprefix("Bearer ")
    assert len(secret) > 16
    for script in ("ps -eo args", "journalctl --no-pager", "docker ps -aq | xargs docker inspect"):
        assert secret not in on("hydrogen", script)


def test_what_is_not_declared_any_more_goes_from_the_machines(results: dict[str, dict[str, Any]]) -> None:
    assert all(KEY in on(node, "cat /home/lab/.ssh/authorized_keys") for node in NODES)
    good(playbook("plan"))
    shown = good(playbook("site"))
    assert "GOES AWAY" in shown
    for node in NODES:
        assert KEY not in on(node, "cat /home/lab/.ssh/authorized_keys")
        assert on(node, "ls /etc/systemd/system | grep -E 'healer|recover|engine-metric' || true") == ""
    assert on("hydrogen", "docker ps -a --format '{{.Names}}' | grep -E 'prometheus|alertmanager' || true") == ""
    assert on("hydrogen", "ls /var/lib/homelab-inference | grep -E 'controller|lab|healer' || true") == ""
    assert changed(good(playbook("site"))) == set()
