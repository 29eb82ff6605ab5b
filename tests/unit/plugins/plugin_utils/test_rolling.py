# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import copy
from typing import Any

import pytest
from ansible_collections.homelab.inference.plugins.plugin_utils import rolling


def server(name: str, host: str, start: int, *models: str, gpus: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"name": name, "host": host, "start": start, "models": list(models), "gpus": list(gpus)}


SERVERS = [
    server("chat", "helium", 1, "chat", gpus=("gpu0",)),
    server("code", "helium", 2, "code", gpus=("gpu1",)),
    server("chat-2", "lithium", 1, "chat", gpus=("gpu0",)),
    server("embed", "lithium", 2, "embed"),
]
WELL = {"chat": "HEALTHY", "code": "BUSY", "chat-2": "HEALTHY", "embed": "HEALTHY"}
MISMATCH = {"state": "driver_mismatch", "evidence": "kernel 550.54, library 550.90", "remedy": "Reboot."}


def names(servers: list[dict[str, Any]]) -> list[str]:
    return [one["name"] for one in servers]


def test_the_plan_says_the_order() -> None:
    assert names(rolling.order(SERVERS)) == ["chat", "chat-2", "code", "embed"]


def test_an_order_given_by_hand_is_kept_and_is_all_there_is() -> None:
    assert names(rolling.order(SERVERS, ["embed", "chat"])) == ["embed", "chat"]


@pytest.mark.parametrize(
    "given,sentence",
    [
        (["chat", "chatt"], "There is no model server chatt. The lab has: chat, chat-2, code, embed."),
        (["chat", "chat"], "chat is named twice in the order. Name each server once."),
    ],
)
def test_a_wrong_order_is_refused(given: list[str], sentence: str) -> None:
    with pytest.raises(rolling.RollingError) as error:
        rolling.order(SERVERS, given)
    assert str(error.value) == sentence


def test_where_all_is_well_nothing_is_refused() -> None:
    assert rolling.refusals(SERVERS, SERVERS, WELL, {"helium": [], "lithium": []}) == []


def test_the_last_replica_that_answers_is_not_stopped() -> None:
    states = {**WELL, "chat-2": "DOWN"}
    assert rolling.refusals(SERVERS[:1], SERVERS, states, {"helium": []}) == [
        "chat on helium is the only one that answers for chat: chat-2 is DOWN. Repair that one first."
    ]
    # As they come out of a playbook, which copies them.
    assert rolling.refusals(copy.deepcopy(SERVERS[:1]), SERVERS, states, {"helium": []})
    # The one that is down is what a restart may mend.
    assert rolling.refusals(SERVERS[2:3], SERVERS, states, {"lithium": []}) == []


def test_a_host_that_was_not_reached_is_no_host_to_restart_something_on() -> None:
    assert rolling.refusals(SERVERS[2:], SERVERS, {}, {"helium": []}) == [
        "lithium was not reached. Switch it on, or name the servers of the others in lab_restart."
    ]


def test_a_driver_that_would_start_nothing_is_a_reason_where_there_are_gpus() -> None:
    found = rolling.refusals(SERVERS, SERVERS, WELL, {"helium": [MISMATCH], "lithium": []})
    assert found == [
        "helium: a server that is stopped there would not start again (kernel 550.54, library 550.90). Reboot."
    ]
    assert rolling.refusals(SERVERS[3:], SERVERS, WELL, {"lithium": [MISMATCH]}) == []
