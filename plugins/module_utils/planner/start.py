# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""In which order servers start on a node, and which of the old ones have to stop before one of the new starts."""

from __future__ import annotations

from typing import Any

from ansible_collections.homelab.inference.plugins.module_utils.planner.room import Room


def order(instances: list[dict[str, Any]], previous: list[dict[str, Any]], room: Room) -> dict[str, list[str]]:
    """Number the servers of each node, note in C(stop_first) whom they replace, and return the names in order.

    A server that is started again stops first itself; those named here are others, which go away, move or shrink later
    in the same run and whose memory is needed before that.
    """
    result: dict[str, list[str]] = {host: [] for host in room.nodes}
    for host in room.nodes:
        here = [one for one in instances if one["node"] == host]
        free = room.free()
        old = {one["name"]: one for one in previous if one["node"] == host and _known(one, room)}
        for one in old.values():
            _move(free, room, one, -1)
        for number, one in enumerate(here, 1):
            one["start"] = number
            one["stop_first"] = _make_way(one, old, free, room)
            result[host].append(one["name"])
            _move(free, room, one, -1)
    return result


def _known(instance: dict[str, Any], room: Room) -> bool:
    return all((instance["node"], where) in room.bins for where in instance["memory"])


def _make_way(one: dict[str, Any], old: dict[str, dict[str, Any]], free: list[int], room: Room) -> list[str]:
    """Take away its own old self, then as many of the other old ones as it needs; return their names."""
    if one["name"] in old:
        _move(free, room, old.pop(one["name"]), 1)
    needs = room.needs(one["node"], one["memory"])
    stopped = []
    while old and any(size > free[number] for number, size in needs):
        short = [number for number, size in needs if size > free[number]]

        def helps(name: str, short: list[int] = short) -> int:
            taken = dict(room.needs(old[name]["node"], old[name]["memory"]))
            return sum(taken.get(number, 0) for number in short)

        name = max(old, key=helps)
        if not helps(name):
            break
        _move(free, room, old.pop(name), 1)
        stopped.append(name)
    return stopped


def _move(free: list[int], room: Room, instance: dict[str, Any], sign: int) -> None:
    for number, size in room.needs(instance["node"], instance["memory"]):
        free[number] += sign * size
