# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a server takes of each device: asked once for each kind of place, not once for each place."""

from __future__ import annotations

import json
from typing import Any

from ansible_collections.homelab.inference.plugins.module_utils.memory import (
    EMULATED_OVERHEAD_MIB,
    GPU_OVERHEAD_MIB,
    HOST_OVERHEAD_MIB,
    estimate,
)

# What a prediction may look at of a device; two cards that agree in it are the same to it.
CLASS = ("vendor", "memory_kind", "architecture", "memory_mib", "cap_mib")


class Footprints:
    """Predictions, kept."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[int, ...]] = {}

    def take(
        self, key: Any, resolved: dict[str, Any], options: dict[str, Any], devices: list[dict[str, Any]], backend: str
    ) -> dict[str, int]:
        """Return the MiB that a server takes of each of its devices and of the host.

        :param key: stands for C(resolved) among all models.
        """
        cards = tuple(tuple(device.get(name) for name in CLASS) for device in devices)
        known = (key, json.dumps(options, sort_keys=True), cards, backend)
        if known not in self._known:
            found = _totals(parts(resolved, options, devices, backend))
            self._known[known] = tuple(found.get(where, 0) for where in _wheres(devices))
        return dict(zip(_wheres(devices), self._known[known]))


def _wheres(devices: list[dict[str, Any]]) -> list[str]:
    return [*(device["id"] for device in devices), "host"]


def _totals(found: list[dict[str, Any]]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for part in found:
        sums[part["where"]] = sums.get(part["where"], 0) + part["bytes"]
    return {where: -(-size // 2**20) for where, size in sums.items()}


def parts(
    resolved: dict[str, Any], options: dict[str, Any], devices: list[dict[str, Any]], backend: str
) -> list[dict[str, Any]]:
    """Return what a server takes, part by part."""
    shape = resolved["shape"]
    size = sum(file["size"] for file in resolved["files"])
    context = options["ctx-size"] // options["parallel"]
    overhead = EMULATED_OVERHEAD_MIB if backend == "emulated" else GPU_OVERHEAD_MIB
    need = estimate(shape, size, context, options["parallel"], options["cache-type-k"], overhead)
    layers = int(shape.get("block_count") or 1)
    on_gpu = layers if options["n-gpu-layers"] == "all" else min(int(options["n-gpu-layers"]), layers)
    experts = sum(shape.get("expert_bytes") or []) / 2**20 * min(options.get("n-cpu-moe", 0), layers) / layers
    weights = max(need["weights"] * on_gpu / layers - experts, 0)
    cache = need["kv"] * on_gpu / layers
    weighing = options.get("tensor-split") or [1]
    found = []
    for device, share in zip(devices, weighing):
        part = share / sum(weighing)
        for kind, amount in (("weights", weights * part), ("kv", cache * part), ("overhead", overhead)):
            found.append({"where": device["id"], "kind": kind, "bytes": int(amount * 2**20), "source": "bound"})
    for kind, amount in (
        ("weights", need["weights"] - weights),
        ("kv", need["kv"] - cache),
        ("base", HOST_OVERHEAD_MIB),
    ):
        if amount:
            found.append({"where": "host", "kind": kind, "bytes": int(amount * 2**20), "source": "bound"})
    return found
