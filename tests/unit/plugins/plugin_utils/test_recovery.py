# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which repairs are tried, when a person is asked, and what is told."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.homelab.inference.plugins.plugin_utils import recovery

SEEN = {"reached": True, "wake": "", "processes": [], "free_mib": 9000}


@pytest.mark.parametrize("state", ["HEALTHY", "BUSY", "STARTING"])
def test_a_server_that_serves_or_loads_is_left_alone(state: str) -> None:
    assert recovery.rungs(state) == []


def test_repairs_go_from_cheap_to_dear() -> None:
    assert recovery.rungs("DOWN") == recovery.rungs("DEGRADED") == ["restart", "recreate", "fetch"]
    assert recovery.rungs("HUNG") == recovery.rungs("STARTING", patience_over=True) == ["kill", "recreate", "fetch"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, ""),
        ({"reached": False}, "Nothing here can wake it"),
        ({"reached": False, "wake": "wol"}, "woken by wol and did not come"),
        ({"processes": ["Ss 1 systemd", "D 700 jbd2/vda", "D<l 812 nvidia-smi"]}, "nvidia-smi (812). Reboot it"),
        ({"processes": ["Ssl 812 nvidia-smi", "Dl 813 llama-server"]}, ""),
        ({"free_mib": 3}, "is full (3 MiB free)"),
        ({"free_mib": None}, ""),
    ],
)
def test_a_person_is_asked_only_for_what_nobody_else_can_do(more: dict[str, Any], words: str) -> None:
    sentence = recovery.person("forge", {**SEEN, **more})
    assert words in sentence and bool(words) == sentence.startswith(("forge", "The disk of forge"))


def test_the_summary_says_what_was_found_done_and_left() -> None:
    report = {
        "node": "forge",
        "seconds": 21.4,
        "outcome": "NOT DONE",
        "found": [{"name": "remote/chat", "state": "DOWN", "evidence": ["tcp: refused"]}],
        "steps": [{"rung": "restart", "name": "chat", "host": "forge", "seconds": 9.6, "after": "HEALTHY"}],
        "persons": ["rack does not answer over SSH."],
        "left": [{"name": "remote/code", "state": "DOWN", "evidence": []}],
    }
    assert recovery.summary(report).splitlines() == [
        "RECOVERY NOT DONE, 21 s, called for forge",
        "  found  remote/chat: DOWN (tcp: refused)",
        "  did    restart chat on forge: HEALTHY after 10 s",
        "  needs a person: rack does not answer over SSH.",
        "  still DOWN: remote/code",
    ]
    well = {**report, "found": [], "steps": [], "persons": [], "left": [], "node": "", "outcome": "DONE"}
    assert recovery.summary(well).splitlines()[1] == "  Everything answers; nothing was done."
