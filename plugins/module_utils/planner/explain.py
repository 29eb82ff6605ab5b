# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Why a model has no place, in numbers, and which changes of the declaration might give it one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ansible_collections.homelab.inference.plugins.module_utils.planner.choices import Choice, contexts, variants
from ansible_collections.homelab.inference.plugins.module_utils.planner.room import HOST, HOST_RESERVE_PART, Room

# Shorter contexts are of no use in a conversation.
SHORTEST_CONTEXT = 2048
GIB = 1024


def where_named(where: str, host: str) -> str:
    """Return a bin in words."""
    return f"the main memory of {host}" if where == HOST else f"{where} of {host}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def nearest(found: list[Choice], free: list[int]) -> tuple[Choice | None, int]:
    """Return the choice that lacks least, best in one bin alone, and the bin in which it lacks most."""
    best: tuple[tuple[bool, int], Choice, int] | None = None
    for choice in found:
        lacks = [(size - free[number], number) for number, size in choice.needs]
        short = [lack for lack, _number in lacks if lack > 0]
        rank = (len(short) > 1, sum(short))
        if best is None or rank < best[0]:
            best = (rank, choice, max(lacks, default=(0, 0))[1])
    return (best[1], best[2]) if best else (None, 0)


def refusal(model: str, found: list[Choice], room: Room, free: list[int]) -> dict[str, Any]:
    """Return the refusal of a model: what its least demanding way needs, and what there is."""
    choice, number = nearest(found, free)
    if choice is None:
        return {**_EMPTY, "model": model, "reason": "no further node that may run it is left"}
    host, where = room.names[number]
    needed = dict(choice.needs)[number]
    step = choice.step
    lack = needed - free[number]
    if lack > 0:
        reason = (
            f"it needs {needed} MiB at {step.context} tokens, {_count(step.slots, 'slot')} and KV type {step.kv}, "
            f"and {where_named(where, host)} has {free[number]} MiB free: {lack} MiB are missing"
        )
    else:
        reason = f"it would fit {where_named(where, host)} only if servers worth more made way"
    return {
        "model": model,
        "reason": reason,
        "node": host,
        "device": where,
        "needed_mib": needed,
        "available_mib": free[number],
        "deficit_mib": max(lack, 0),
        "change": None,
    }


_EMPTY: dict[str, Any] = {
    "model": "",
    "reason": "",
    "node": None,
    "device": None,
    "needed_mib": None,
    "available_mib": None,
    "deficit_mib": None,
    "change": None,
}


def without_numbers(model: str, reason: str) -> dict[str, Any]:
    """Return the refusal of a model for another reason than memory."""
    return {**_EMPTY, "model": model, "reason": reason}


def changes(
    model: dict[str, Any], resolved: dict[str, Any], nodes: dict[str, dict[str, Any]], refused: dict[str, Any]
) -> Iterator[tuple[dict[str, Any], dict[str, Any], dict[str, dict[str, Any]]]]:
    """Yield changes that may help, the cheapest first: C((change, model with it, nodes with it))."""
    name = model["name"]
    trained = contexts(model, variants(resolved)[0]["shape"])
    if model["mode"] != "embedding":
        shorter = max(min(trained), SHORTEST_CONTEXT)
        while shorter // 2 >= SHORTEST_CONTEXT:
            shorter //= 2
            yield _of_model(model, "context", [*trained, shorter], f"let {name} go down to {shorter} tokens")
    for kv in ("q8_0", "q4_0"):
        if kv not in model["kv"]:
            yield _of_model(model, "kv", [*model["kv"], kv], f"allow {name} a KV cache of type {kv}")
    fewer = min(model["slots"])
    while fewer > 1:
        fewer //= 2
        yield _of_model(model, "slots", [*model["slots"], fewer], f"let {name} go down to {_count(fewer, 'slot')}")
    for host in nodes:
        if model["nodes"] is not None and host not in model["nodes"]:
            yield _of_model(model, "nodes", [*model["nodes"], host], f"allow {name} on {host} too")
    if "on-demand" not in model["keep"]:
        yield _of_model(model, "keep", [*model["keep"], "on-demand"], f"let {name} take turns with others")
    both = {"context": [*trained, SHORTEST_CONTEXT], "kv": [*model["kv"], "q8_0"], "slots": [*model["slots"], 1]}
    if model["mode"] != "embedding" and min(trained) > SHORTEST_CONTEXT:
        change, changed, _none = _of_model(
            model,
            "context",
            both["context"],
            f"let {name} go down to {SHORTEST_CONTEXT} tokens, a KV cache of type q8_0 and one slot",
        )
        yield change, {**changed, **both}, None
    if isinstance(model["replicas"], int) and model["replicas"] > 1:
        yield _of_model(
            model, "replicas", model["replicas"] - 1, f"ask for {_count(model['replicas'] - 1, 'server')} of {name}"
        )
    if refused["deficit_mib"]:
        yield from _of_node(refused["node"], refused["device"], refused["deficit_mib"], nodes)


def _of_model(
    model: dict[str, Any], key: str, value: Any, sentence: str
) -> tuple[dict[str, Any], dict[str, Any], None]:
    return (
        {"key": f"lab_models.{model['name']}.{key}", "value": value, "sentence": sentence},
        {**model, key: value},
        None,
    )


def _of_node(
    host: str, where: str, lack: int, nodes: dict[str, dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None, dict[str, dict[str, Any]]]]:
    """Yield what would give a bin more room: a smaller reservation, a higher cap, more memory."""
    node = nodes[host]
    reserved = node.get("reservations", {})
    if reserved.get(where, 0) >= lack:
        less = {**node, "reservations": {**reserved, where: reserved[where] - lack}}
        yield (
            {
                "key": f"lab_reservations.{host}",
                "value": f"{reserved[where] - lack}MiB",
                "sentence": f"reserve {lack} MiB less on {where_named(where, host)}",
            },
            None,
            {**nodes, host: less},
        )
    for device in node["devices"]:
        cap = device.get("cap_mib")
        if device["id"] == where and cap and cap + lack <= device["memory_mib"]:
            more = [{**one, "cap_mib": cap + lack} if one["id"] == where else one for one in node["devices"]]
            how = "sysctl iogpu.wired_limit_mb" if device["vendor"] == "apple" else "its driver's limit"
            yield (
                {
                    "key": f"{host}.node_gpus.{where}.cap_mib",
                    "value": cap + lack,
                    "sentence": f"raise what {where} of {host} may take to {cap + lack} MiB ({how})",
                },
                None,
                {**nodes, host: {**node, "devices": more}},
            )
    # Of more main memory the system keeps a part for itself.
    gib = -(-(lack * (HOST_RESERVE_PART + 1) // HOST_RESERVE_PART + 1 if where == HOST else lack) // GIB)
    if where == HOST:
        larger = {**node, "memory_mib": node["memory_mib"] + gib * GIB}
        if node.get("limit_mib"):
            larger["limit_mib"] = node["limit_mib"] + gib * GIB
        key, value = f"{host}.node_memory_mib", larger["memory_mib"]
    else:
        size = gib * GIB + sum(device["memory_mib"] for device in node["devices"] if device["id"] == where)
        larger = {
            **node,
            "devices": [
                {**device, "memory_mib": size, **({"cap_mib": size} if device.get("cap_mib") else {})}
                if device["id"] == where
                else device
                for device in node["devices"]
            ],
        }
        key, value = f"{host}.node_gpus.{where}.memory_mib", size
    yield (
        {"key": key, "value": value, "sentence": f"give {where_named(where, host)} {gib} GiB more"},
        None,
        {**nodes, host: larger},
    )


def waits(refused: dict[str, Any], previous: list[dict[str, Any]], nodes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return for what a model waits: the node or card that it ran on, else memory."""
    name = refused["model"]
    for one in previous:
        if one["model"] != name:
            continue
        host = one["node"]
        if host not in nodes:
            return {"model": name, "for": host, "sentence": f"{name} waits for {host} to come back."}
        there = {device["id"] for device in nodes[host]["devices"]}
        gone = [device for device in one["devices"] if device not in there]
        if gone:
            sentence = f"{name} waits for {where_named(gone[0], host)} to come back."
            return {"model": name, "for": f"{host} {gone[0]}", "sentence": sentence}
    where = f"{refused['node']} {refused['device']}" if refused["node"] else None
    return {"model": name, "for": where, "sentence": f"{name} waits: {refused['reason']}."}
