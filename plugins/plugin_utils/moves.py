# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What recovery has moved to other nodes because one is dead.

A file beside the plan, C(.lab.moves.json)::

    {"lost": [NODE], "since": ISO time, "inputs": of the plan that it belongs to, "instances": those that run instead}

It counts as long as that plan is in force, also for a run from a checkout with the same lock, and is taken back only
when told: the file goes then.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ansible_collections.homelab.inference.plugins.module_utils import placement
from ansible_collections.homelab.inference.plugins.module_utils.planner.choices import variants
from ansible_collections.homelab.inference.plugins.module_utils.planner.files import in_place
from ansible_collections.homelab.inference.plugins.plugin_utils import lock as lock_module


def path(lock_path: Path) -> Path:
    """Return the file for the lab with this lock."""
    return lock_module.beside(lock_path, ".moves.json")


def read(file: Path, lock: dict[str, Any] | None) -> dict[str, Any]:
    """Return what was moved of this plan; empty where nothing was, or the lab was planned anew since."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not lock or not isinstance(found, dict) or found.get("inputs") != lock.get("inputs"):
        return {}
    return found


def applied(lock: dict[str, Any], moved: dict[str, Any]) -> dict[str, Any]:
    """Return the lock with what runs instead."""
    return {**lock, "instances": moved["instances"]} if moved else lock


def without(
    lock: dict[str, Any],
    models: dict[str, dict[str, Any]],
    lost: list[str],
    since: str,
    closed: Collection[str] = (),
) -> dict[str, Any]:
    """Return what is moved when nodes are lost, empty where nothing can be: by priority what fits on those that remain.

    :param lock: the plan in force, with what was moved before.
    :param models: the registry in normal form, see C(lab.models).
    :param lost: all nodes that are lost now.
    :param closed: nodes that keep what they have and get nothing, those in maintenance for example.
    """
    nodes = {host: node for host, node in lock["nodes"].items() if host not in lost and host not in closed}
    keeps = [one for one in lock["instances"] if one["node"] in closed and one["node"] not in lost]
    found = placement.plan(
        _with_files(_rest(models, keeps), lock, [*lost, *closed], lost),
        lock["models"],
        nodes,
        lock["instances"],
        recovery=True,
        previous_nodes=lock["nodes"],
    )
    planned = found["instances"] + keeps
    stays = [one for one in lock["instances"] if one["node"] not in lost]
    if {one["name"] for one in planned} <= {one["name"] for one in stays}:
        return {}
    return {
        "lost": sorted(lost),
        "since": since,
        "inputs": lock["inputs"],
        "instances": planned + _awaited(lock["instances"], planned, lost),
    }


def _rest(models: dict[str, dict[str, Any]], keeps: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the models of which more servers are wanted than those that are kept anyway, and how many more."""
    there = Counter(one["model"] for one in keeps)
    return {
        name: {**model, "replicas": model["replicas"] - there[name]} if isinstance(model["replicas"], int) else model
        for name, model in models.items()
        if model["replicas"] == "each" or model["replicas"] > there[name]
    }


def _with_files(
    models: dict[str, dict[str, Any]], lock: dict[str, Any], closed: Collection[str], lost: Collection[str]
) -> dict[str, dict[str, Any]]:
    """Return the models whose files can be had without the lost nodes, each with the nodes that can have them.

    Files out of the library of a lost node are only where a server has them already, and in other libraries.
    """
    found = {}
    for name, model in models.items():
        files = [one["files"] for one in variants(lock["models"][name])] if name in lock["models"] else []
        if any(file.get("host") in lost for one in files for file in one):
            runs = {one["node"] for one in lock["instances"] if one["model"] == name}
            hosts = [
                host
                for host in model["nodes"] or lock["nodes"]
                if host in runs
                or (host in lock["nodes"] and any(in_place(one, lock["nodes"][host]["library"]) for one in files))
            ]
            model = {**model, "nodes": hosts}
        if model["nodes"] is None or set(model["nodes"]) - set(closed):
            found[name] = {
                **model,
                "fallbacks": model["fallbacks"] and [one for one in model["fallbacks"] if one in models],
            }
    return found


def _awaited(before: list[dict[str, Any]], planned: list[dict[str, Any]], lost: list[str]) -> list[dict[str, Any]]:
    """Return the servers of lost nodes that got no other place: they serve again when their node is back."""
    placed = Counter(one["model"] for one in planned)
    found = []
    for one in sorted(before, key=lambda one: one["node"] in lost):
        if placed[one["model"]] > 0:
            placed[one["model"]] -= 1
        elif one["node"] in lost:
            found.append(one)
    return found


def sentences(lock: dict[str, Any], moved: dict[str, Any]) -> list[str]:
    """Return what runs elsewhere than planned, or otherwise, a sentence each."""
    if not moved:
        return []
    planned = {one["name"]: one for one in lock["instances"]}
    runs = {one["name"]: one for one in moved["instances"]}
    new = [one for name, one in runs.items() if name not in planned]
    found = []
    for name, one in planned.items():
        where, now = one["node"], runs.get(name)
        if now is None:
            now = next((other for other in new if other["model"] == one["model"]), None)
            if now is None:
                found.append(f"{name} of {where} has no place")
                continue
            new.remove(now)
        if now["node"] != where:
            found.append(f"{one['model']} runs on {now['node']} instead of {where}")
        elif now != one:
            found.append(f"{name} on {where} makes room")
    return found
