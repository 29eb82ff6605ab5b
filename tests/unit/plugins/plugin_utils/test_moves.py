# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a dead node had runs elsewhere, the rest stays as it is, and a new plan ends that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ansible_collections.homelab.inference.plugins.module_utils import placement
from ansible_collections.homelab.inference.plugins.plugin_utils import moves

from tests.unit.plugins.module_utils.test_placement import gpu, inputs, node

SINCE = "2026-01-01T12:00:00+00:00"


def planned(models: dict[str, Any], nodes: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a registry and the lock of its plan, as far as moves need it."""
    registry, resolved = inputs(models)
    plan = placement.plan(registry, resolved, nodes, [])
    return registry, {"instances": plan["instances"], "nodes": nodes, "models": resolved, "inputs": plan["inputs"]}


TWO = {"a": node(gpu(0, 16384)), "b": node(gpu(0, 16384))}
SMALL = {"context": 8192}


def test_what_a_dead_node_had_goes_where_there_is_room_and_nothing_else_moves() -> None:
    registry, lock = planned({"chat": {**SMALL, "nodes": "a"}, "code": {**SMALL, "nodes": ["b", "a"]}}, TWO)
    assert [(one["name"], one["node"]) for one in lock["instances"]] == [("chat", "a"), ("code", "b")]
    moved = moves.without(lock, registry, ["b"], SINCE)
    runs = {one["model"]: one for one in moves.applied(lock, moved)["instances"]}
    assert {name: one["node"] for name, one in runs.items()} == {"chat": "a", "code": "a"}
    assert runs["chat"] == lock["instances"][0]
    assert runs["code"]["port"] != runs["chat"]["port"]
    assert (moved["lost"], moved["since"]) == (["b"], SINCE)
    assert moves.sentences(lock, moved) == ["code runs on a instead of b"]


def test_where_there_is_no_room_nothing_moves() -> None:
    registry, lock = planned({"chat": {**SMALL, "nodes": "a"}, "code": {**SMALL, "nodes": "b"}}, TWO)
    assert moves.without(lock, registry, ["b"], SINCE) == {}
    assert moves.applied(lock, {}) == lock
    assert moves.sentences(lock, {}) == []


def test_the_second_replica_of_a_model_has_no_second_place() -> None:
    registry, lock = planned({"chat": {**SMALL, "replicas": 2}}, TWO)
    assert moves.without(lock, registry, ["b"], SINCE) == {}


def test_what_got_no_place_is_awaited_where_it_was() -> None:
    registry, lock = planned({"chat": {**SMALL, "replicas": 2}, "code": {**SMALL, "nodes": ["b", "a"]}}, TWO)
    moved = moves.without(lock, registry, ["b"], SINCE)
    runs = {one["name"]: one["node"] for one in moved["instances"]}
    lost = {one["name"]: "b" for one in lock["instances"] if one["model"] == "chat" and one["node"] == "b"}
    assert lost.items() <= runs.items() and len(runs) == 3
    assert moves.sentences(lock, moved) == ["code runs on a instead of b"]


def test_a_node_in_maintenance_keeps_what_it_has_and_gets_nothing() -> None:
    three = {**TWO, "c": node(gpu(0, 16384))}
    registry, lock = planned(
        {"chat": {**SMALL, "nodes": ["a", "c"]}, "code": {**SMALL, "nodes": ["b", "a", "c"], "fallbacks": ["chat"]}},
        three,
    )
    before = {one["name"]: one for one in lock["instances"]}
    assert (before["chat"]["node"], before["code"]["node"]) == ("a", "b")
    moved = moves.without(lock, registry, ["b"], SINCE, closed=["a"])
    runs = {one["model"]: one for one in moved["instances"]}
    assert runs["chat"] == before["chat"] and runs["code"]["node"] == "c"
    assert moves.without(lock, registry, ["b"], SINCE, closed=["a", "c"]) == {}


def test_what_only_a_lost_library_has_cannot_move() -> None:
    registry, lock = planned({"chat": {**SMALL, "nodes": "a"}, "code": {**SMALL, "nodes": ["b", "a"]}}, TWO)
    there = {**lock["models"]["code"], "files": [{**one, "host": "b"} for one in lock["models"]["code"]["files"]]}
    lock["models"]["code"] = there
    assert moves.without(lock, registry, ["b"], SINCE) == {}
    lock["models"]["code"] = {**there, "files": [{**one, "host": "nas"} for one in there["files"]]}
    assert moves.without(lock, registry, ["b"], SINCE)


def test_the_same_again_moves_nothing_more() -> None:
    registry, lock = planned({"chat": SMALL}, TWO)
    (home,) = [one["node"] for one in lock["instances"]]
    moved = moves.without(lock, registry, [home], SINCE)
    assert moved
    assert moves.without(moves.applied(lock, moved), registry, [home], SINCE) == {}


def test_a_new_plan_ends_it(tmp_path: Path) -> None:
    registry, lock = planned({"chat": SMALL}, TWO)
    moved = moves.without(lock, registry, [lock["instances"][0]["node"]], SINCE)
    file = moves.path(tmp_path / ".lab.lock.yml")
    assert file.name == ".lab.moves.json"
    assert moves.read(file, lock) == {}
    file.write_text(json.dumps(moved), encoding="utf-8")
    assert moves.read(file, lock) == moved
    assert moves.read(file, {**lock, "inputs": "of another plan"}) == {}
    assert moves.read(file, None) == {}
    file.write_text("[", encoding="utf-8")
    assert moves.read(file, lock) == {}
