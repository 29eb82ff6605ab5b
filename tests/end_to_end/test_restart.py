# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Model servers are restarted and changed while clients ask, and no request is lost.

tests/bench/restart.py does the same at length. Needs the box (./lab up), and leaves it as it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml
from test_answers import GATEWAY, INVENTORY, on
from test_changes import balancer, good, playbook, server_states, started

from tests.bench.load import Cutter, Load, Result
from tests.sample import long

ASKED = {"chat": {"chat"}, "code": {"code", "chat"}}
CLIENTS = 4


def load(url: str = GATEWAY) -> Load:
    """Clients that ask without a pause, half of them for streams."""
    secrets = yaml.safe_load((INVENTORY / "group_vars" / "all" / "secrets.yml").read_text(encoding="utf-8"))
    return Load(url, secrets["lab_secret_litellm_master_key"], ASKED, clients=CLIENTS)


def meanwhile(act: Callable[[], Any]) -> Result:
    """Return what clients saw while something was done."""
    clients = load()
    clients.start()
    try:
        act()
    finally:
        found = clients.stop()
    return found


def servers() -> dict[str, str]:
    """Return when each model server's container was started."""
    found = {**started("helium"), **started("lithium")}
    return {name.removeprefix("llamacpp-"): when for name, when in found.items() if name.startswith("llamacpp-")}


def test_a_loss_would_be_counted() -> None:
    """The clients are asked first whether they see a stream that was cut."""
    with Cutter(GATEWAY) as cutter:
        clients = load(cutter.url)
        clients.start()
        assert cutter.cut()
        found = clients.stop()
    assert len(found.failures) == 1


def test_every_server_is_restarted_and_no_request_is_lost() -> None:
    before = servers()
    output: list[str] = []
    found = meanwhile(lambda: output.append(good(playbook("restart"))))
    assert found.failures == []
    assert found.requests > 50
    after = servers()
    assert set(after) == set(before) == {"chat", "chat-2", "code", "embed", "embed-2"}
    assert all(after[name] > before[name] for name in before)
    # In the order of the plan, which is that of the starts.
    order = re.findall(r"^TASK \[Restart (\S+)\]", output[0], re.MULTILINE)
    assert sorted(after, key=lambda name: after[name]) == order


@long
def test_an_order_by_hand_is_kept_and_touches_nobody_else() -> None:
    before = servers()
    output = good(playbook("restart", "-e", "lab_restart=embed-2,code"))
    assert re.findall(r"^TASK \[Restart (\S+)\]", output, re.MULTILINE) == ["embed-2", "code"]
    assert {name for name, when in servers().items() if when != before[name]} == {"embed-2", "code"}
    unknown = playbook("restart", "-e", "lab_restart=codde")
    assert unknown.returncode != 0
    assert "There is no model server codde. The lab has: chat, chat-2, code, embed, embed-2." in unknown.stdout


@long
def test_the_last_replica_is_not_restarted_unless_told_to() -> None:
    on("lithium", "systemctl stop llamacpp-chat-2.service")
    try:
        before = servers()
        refused = playbook("restart", "-e", "lab_restart=chat")
        assert refused.returncode == 2
        assert "chat on helium is the only one that answers for chat: chat-2 is DOWN. Repair that one first." in (
            refused.stdout
        )
        assert servers() == before
        good(playbook("restart", "-e", "lab_restart=chat", "-e", "lab_restart_anyway=true"))
        assert servers()["chat"] > before["chat"]
    finally:
        on("lithium", "systemctl reset-failed llamacpp-chat-2.service; systemctl start llamacpp-chat-2.service")


@long
def test_a_server_that_does_not_come_back_stops_the_run_and_the_rest_serves() -> None:
    on("lithium", "docker stop llamacpp-chat-2 && docker rename llamacpp-chat-2 away")
    try:
        before = servers()
        failed = playbook("restart", "-e", "lab_restart=chat-2,embed-2")
        assert failed.returncode == 2
        assert "chat-2 on lithium was not restarted" in failed.stdout
        assert "TASK [Restart embed-2]" not in failed.stdout
        assert servers()["embed-2"] == before["embed-2"]
        assert load().run(requests=20).failures == []
    finally:
        on("lithium", "docker rename away llamacpp-chat-2")
    good(playbook("restart", "-e", "lab_restart=chat-2"))


def test_a_changed_model_is_rolled_and_no_request_is_lost(models: dict[str, Any]) -> None:
    models["chat"]["context"] = 1024
    good(playbook("plan", models=models))
    before = servers()
    found = meanwhile(lambda: good(playbook("site", models=models)))
    assert found.failures == []
    assert {name for name, when in servers().items() if when != before[name]} == {"chat", "chat-2"}


def test_what_an_interrupted_run_left_drained_serves_again(models: dict[str, Any]) -> None:
    """And the change of the test before is taken back."""
    balancer("set server embed/embed-2 state drain")
    models["chat"]["context"] = 2048
    good(playbook("plan", models=models))
    good(playbook("site", models=models))
    states = server_states()
    assert states == dict.fromkeys(("chat", "chat-2", "code", "embed", "embed-2"), "0")
