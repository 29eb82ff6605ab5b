# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The room that a lab has for models: each GPU, and each node's main memory."""

from __future__ import annotations

from typing import Any

HOST = "host"
VENDOR_BACKENDS = {
    "nvidia": "cuda",
    "tegra": "cuda",
    "amd": "rocm",
    "intel": "sycl",
    "apple": "metal",
    "emulated": "emulated",
}
# What a driver keeps of a card and no process gets, in MiB: nvidia-smi -q calls it Reserved, and says 354 to 487 on the
# cards in tests/unit/fixtures/gpu. The numbers for AMD and Intel are as careful, not measured. What Metal recommends,
# and what a Tegra shares with its processor, has such a part taken off already; an emulated card has no driver.
DEVICE_RESERVE_MIB = {"nvidia": 512, "amd": 512, "intel": 512, "apple": 0, "tegra": 0, "emulated": 0}
# The operating system and the engine keep a sixteenth of the main memory, within these bounds: a fixed number would
# leave nothing on a small board, and too little beside the page cache of a large server.
HOST_RESERVE_PART = 16
LEAST_HOST_RESERVE_MIB, MOST_HOST_RESERVE_MIB = 256, 2048
# A measured figure that moved by no more than this part of the size counts as unchanged. What programs hold of a main
# memory comes and goes by more: as much as is kept for the system.
STEADY = 0.02
STEADY_PROGRAMS = 1 / HOST_RESERVE_PART


def backend(device: dict[str, Any]) -> str:
    """Return the llama.cpp backend for a device.

    An AMD processor with unified memory gets Vulkan: ROCm sees only what the firmware set aside there
    (llama.cpp issue 19818).
    """
    if device["vendor"] == "amd" and device["memory_kind"] == "unified":
        return "vulkan"
    return VENDOR_BACKENDS[device["vendor"]]


def worth_using(devices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the devices that models are placed on: graphics built into a processor only where AMD's is all there is.

    The one beside a graphics card has no memory of its own to add, and Intel's is not faster than the processor it sits
    in.
    """
    dedicated = any(device["memory_kind"] == "dedicated" for device in devices)
    built_in = {"amd"} if dedicated else set()
    return [
        device
        for device in devices
        if device["memory_kind"] == "dedicated" or device["vendor"] not in built_in | {"intel"}
    ]


def steady(nodes: dict[str, dict[str, Any]], before: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the nodes with the figures of the plan in force, where what is measured now hardly differs from them.

    What the owner says (reservations, caps, limits) is never kept from before.
    """
    result = {}
    for host, node in nodes.items():
        old = before.get(host, {})
        known = {device["id"]: device for device in old.get("devices", [])}
        kept = _kept(node, old, ("memory_mib",), STEADY * node["memory_mib"])
        result[host] = {
            **_kept(kept, old, ("memory_used_mib",), STEADY_PROGRAMS * node["memory_mib"]),
            "devices": [
                _kept(device, known.get(device["id"], {}), ("memory_mib", "used_mib"), STEADY * device["memory_mib"])
                for device in node["devices"]
            ],
        }
    return result


def _kept(now: dict[str, Any], before: dict[str, Any], names: tuple[str, ...], most: float) -> dict[str, Any]:
    figures = {
        name: before[name]
        for name in names
        if now.get(name) is not None and before.get(name) is not None and abs(now[name] - before[name]) <= most
    }
    return {**now, **figures}


class Room:
    """All memory that models may take, as numbered bins; a bin is a GPU or a node's main memory.

    What lies on a GPU with unified memory counts twice: against its own cap, and against the main memory.
    """

    def __init__(self, nodes: dict[str, dict[str, Any]]) -> None:
        self.nodes = nodes
        self.names: list[tuple[str, str]] = []
        self.sizes: list[int] = []
        self.reserved: list[int] = []
        self.others: list[int] = []
        self.bins: dict[tuple[str, str], int] = {}
        self.shared: set[int] = set()
        for host, node in nodes.items():
            memory = min(node["memory_mib"], node.get("limit_mib") or node["memory_mib"])
            reserve = min(max(memory // HOST_RESERVE_PART, LEAST_HOST_RESERVE_MIB), MOST_HOST_RESERVE_MIB)
            wanted = node.get("reservations", {})
            unified = [device["id"] for device in node["devices"] if device["memory_kind"] == "unified"]
            own = sum(wanted.get(where, 0) for where in (HOST, *unified))
            self._add(host, HOST, memory, reserve, own, node.get("memory_used_mib"))
            for device in worth_using(node["devices"]):
                where = device["id"]
                size = min(device["memory_mib"], device.get("cap_mib") or device["memory_mib"])
                own = wanted.get(where, 0)
                if where in unified:
                    self.shared.add(len(self.names))
                    self._add(host, where, size, 0, own, None)
                else:
                    self._add(host, where, size, DEVICE_RESERVE_MIB[device["vendor"]], own, device.get("used_mib"))

    def _add(self, host: str, where: str, size: int, reserve: int, wanted: int, used: int | None) -> None:
        self.bins[host, where] = len(self.names)
        self.names.append((host, where))
        self.sizes.append(size)
        self.reserved.append(min(reserve + wanted, size))
        # What is reserved for somebody may be in use by him now: it counts once.
        self.others.append(min(max((used or 0) - wanted, 0), size - self.reserved[-1]))

    def free(self) -> list[int]:
        """Return what models may take of each bin, in MiB."""
        return [size - reserved - other for size, reserved, other in zip(self.sizes, self.reserved, self.others)]

    def needs(self, host: str, memory: dict[str, int]) -> tuple[tuple[int, int], ...]:
        """Return what a server takes of each bin, from what it takes of each device and of the host."""
        found: dict[int, int] = {}
        for where, size in memory.items():
            number = self.bins[host, where]
            found[number] = found.get(number, 0) + size
            if number in self.shared:
                main = self.bins[host, HOST]
                found[main] = found.get(main, 0) + size
        return tuple((number, size) for number, size in sorted(found.items()) if size > 0)

    def left(self, planned: list[int]) -> dict[str, dict[str, dict[str, int]]]:
        """Return the books of each node: how large each bin is, who takes what of it, and what is left."""
        result: dict[str, dict[str, dict[str, int]]] = {host: {} for host in self.nodes}
        for number, (host, where) in enumerate(self.names):
            size, reserved, others = self.sizes[number], self.reserved[number], self.others[number]
            result[host][where] = {
                "size_mib": size,
                "reserved_mib": reserved,
                "others_mib": others,
                "planned_mib": planned[number],
                "left_mib": size - reserved - others - planned[number],
            }
        for number in self.shared:
            host, where = self.names[number]
            entry = result[host][where]
            entry["left_mib"] = min(entry["left_mib"], result[host][HOST]["left_mib"])
        return result
