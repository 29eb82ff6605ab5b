# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A GPU keeps the id that the lock gave it, and one that is away is named and not forgotten."""

from __future__ import annotations

from typing import Any

from ansible_collections.homelab.inference.plugins.plugin_utils.drift import bind, without_ours


def gpu(name: str, uuid: str | None = None, pci: str | None = None, mib: int = 1000) -> dict[str, Any]:
    return {"id": name, "uuid": uuid, "pci": pci, "memory_mib": mib, "name": "card"}


def test_ids_follow_the_card_and_not_its_place() -> None:
    locked = [gpu("gpu0", "A"), gpu("gpu1", "B")]
    devices, missing = bind([gpu("gpu0", "B", mib=2000), gpu("gpu1", "A")], locked)
    assert [(device["id"], device["uuid"], device["memory_mib"]) for device in devices] == [
        ("gpu0", "A", 1000),
        ("gpu1", "B", 2000),
    ]
    assert missing == []


def test_a_card_that_is_away_stays_and_is_named() -> None:
    locked = [gpu("gpu0", None, "0000:01:00.0"), gpu("gpu1", "B")]
    devices, missing = bind([gpu("gpu0", "B")], locked)
    assert devices == locked
    assert missing == [locked[0]]


def test_a_new_card_takes_the_next_free_id() -> None:
    devices, missing = bind([gpu("gpu0", "NEW"), gpu("gpu1", "A")], [gpu("gpu0", "A")])
    assert [(device["id"], device["uuid"]) for device in devices] == [("gpu0", "A"), ("gpu1", "NEW")]
    assert missing == []


def test_what_is_ours_is_not_held_by_others() -> None:
    facts = {"devices": [{**gpu("gpu0", "A"), "used_mib": 8000}], "memory_mib": 64000, "memory_used_mib": 9000}
    seen = without_ours(facts, {"gpu0": 5000, "host": 10000})
    assert (seen["devices"][0]["used_mib"], seen["memory_used_mib"]) == (3000, 0)
    # A card that did not answer keeps what the lock says of it, and one that does not tell says nothing.
    assert without_ours(facts, {"gpu0": 5000}, ["gpu0"])["devices"][0]["used_mib"] == 8000
    silent = {"devices": [gpu("gpu0", "A")], "memory_used_mib": None}
    assert without_ours(silent, {"gpu0": 1})["devices"][0]["used_mib"] is None


def test_where_models_take_turns_the_lock_says_what_others_hold() -> None:
    """Which of them is awake is not known, and a plan shall not change with it."""
    facts = {"devices": [{"id": "gpu0", "used_mib": 14000}, {"id": "gpu1", "used_mib": 700}], "memory_used_mib": 3000}
    seen = without_ours(facts, {"gpu0": 20000, "gpu1": 200, "host": 90}, [], {"gpu0": 10000, "host": 2900})
    assert [device["used_mib"] for device in seen["devices"]] == [10000, 500] and seen["memory_used_mib"] == 2900
