# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Holds what servers took against what was planned for them.

The file beside the lock, C(.lab.measured.json)::

    {"chat": {"model": ..., "shape": (fingerprint), "devices": ["gpu0"], "node": ..., "image_id": ...,
              "started_at": ..., "server_options": {...},
              "memory": {"gpu0": {"model": MiB, "kv": MiB, ...}, "host": {...}},
              "planned": {"gpu0": MiB, "host": MiB}, "took": {"gpu0": MiB, "host": MiB}, "process": {"gpu0": MiB}}}

What the driver says of a process beyond the buffers in its log is what it takes for itself. The next plan counts with
that instead of a constant.
"""

from __future__ import annotations

import json
from typing import Any

from ansible_collections.homelab.inference.plugins.module_utils.memory.calibration import fingerprint
from ansible_collections.homelab.inference.plugins.plugin_utils.views import chosen

# What a server's log tells of: the rest of a plan (what a driver keeps, a process's own memory) stands in no log.
LOGGED = frozenset({"weights", "repack", "kv", "recurrent", "compute", "output", "projector", "draft"})
# Beyond this share of what was planned, or this many MiB where that is little, the difference is said.
TOLERANCE, LEAST_MIB = 0.02, 8
# Overheads are rounded up to this, so that the next start changes no plan.
STEP_MIB = 16


def planned(instance: dict[str, Any]) -> dict[str, float]:
    """Return the MiB per device that the plan foresees for what the log tells of."""
    sizes: dict[str, float] = {}
    for part in instance.get("parts", []):
        if part["kind"] in LOGGED:
            sizes[part["where"]] = sizes.get(part["where"], 0.0) + part["bytes"] / 2**20
    return {where: round(size, 2) for where, size in sizes.items()}


def merge(
    before: dict[str, Any], lock: dict[str, Any], answers: dict[str, dict[str, Any]]
) -> tuple[dict[str, Any], list[str]]:
    """Return C((measured, sentences)): the file as it is now, and a sentence for each server that took something else.

    A server that was not asked, or whose log does not reach back to its start any more, keeps its entry. One that left
    the lock loses it.

    :param before: the file as it was.
    :param answers: per host what module llamacpp_memory_info returned.
    """
    measured, sentences = {}, []
    for instance in lock["instances"]:
        name, host = instance["name"], instance["node"]
        answer = answers.get(host, {"servers": {}, "problems": []})
        server = answer["servers"].get(f"llamacpp-{name}")
        if server is None:
            if name in before and before[name]["node"] == host:
                measured[name] = before[name]
            else:
                sentences += [
                    problem["error"] for problem in answer["problems"] if problem["name"] == f"llamacpp-{name}"
                ]
            continue
        foreseen = planned(instance)
        took = {where: round(sum(kinds.values()), 2) for where, kinds in server["memory"].items()}
        measured[name] = {
            "model": instance["model"],
            "shape": fingerprint(chosen(instance, lock)["shape"]),
            "devices": instance["devices"],
            "node": host,
            "image_id": server["image_id"],
            "started_at": server["started_at"],
            "server_options": instance["server_options"],
            "memory": server["memory"],
            "planned": foreseen,
            "took": took,
            "process": server.get("process", {}),
        }
        for where, size in foreseen.items():
            if abs(took.get(where, 0.0) - size) > max(TOLERANCE * size, LEAST_MIB):
                sentences.append(
                    f"{name} took {took.get(where, 0.0):.0f} MiB of {where} of {host}, {size:.0f} MiB were planned."
                )
    return measured, sentences


def overheads(measured: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Return per host and card the MiB that a server takes of it beside its buffers: the most that any server did."""
    found: dict[str, dict[str, int]] = {}
    for entry in measured.values():
        if not isinstance(entry, dict) or not {"node", "took"} <= set(entry):
            continue  # written by somebody else
        for device, size in (entry.get("process") or {}).items():
            beside = size - entry["took"].get(device, 0.0)
            if beside > 0:
                there = found.setdefault(entry["node"], {})
                there[device] = max(there.get(device, 0), -(-int(beside + 0.5) // STEP_MIB) * STEP_MIB)
    return found


def parse(text: str) -> dict[str, Any]:
    """Return the file's content; one that cannot be read is as good as none, since every run writes it anew."""
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def render(measured: dict[str, Any]) -> str:
    """Return the file's text."""
    return json.dumps(measured, indent=1, sort_keys=True) + "\n"
