# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which model runs where, with which flags. Pure: the same facts give the same plan.

A first, simple placement: models in the order of their priority; each where its declaration pins it, else on the first
node with room; on one GPU if it fits there, else split over the GPUs of the node, else on the processor. What the
previous plan had keeps its node, name and port as long as that still fits.
"""

from __future__ import annotations

import itertools
from typing import Any

from ansible_collections.homelab.inference.plugins.module_utils.memory import (
    EMULATED_OVERHEAD_MIB,
    GPU_OVERHEAD_MIB,
    HOST_OVERHEAD_MIB,
    estimate,
)

FIRST_PORT = 8080
LAST_CONTEXT = 32768
LEAST_CONTEXT = 8192
# All layers, more than any model has; llama-server's own spelling of it is "all".
ALL_LAYERS = "all"
VENDOR_BACKENDS = {
    "nvidia": "cuda",
    "tegra": "cuda",
    "amd": "rocm",
    "intel": "sycl",
    "apple": "metal",
    "emulated": "emulated",
}
# What the operating system and the engine keep for themselves on a node.
HOST_RESERVE_MIB = 1024


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


class Room:
    """What is free on each node while a plan is being made, in MiB."""

    def __init__(self, nodes: dict[str, dict[str, Any]]) -> None:
        self.nodes = nodes
        self.free: dict[str, dict[str, int]] = {}
        for host, node in nodes.items():
            reserved = node.get("reservations", {})
            room = {device["id"]: (device.get("cap_mib") or device["memory_mib"]) for device in node["devices"]}
            room["host"] = max(node["memory_mib"] - HOST_RESERVE_MIB, 0)
            self.free[host] = {where: max(size - reserved.get(where, 0), 0) for where, size in room.items()}

    def candidates(self, host: str, gpu_only: bool = False) -> list[list[dict[str, Any]]]:
        """Return the device sets to try on a node, best first.

        Each GPU alone, then all GPUs of one backend together, then the processor.
        """
        devices = worth_using(self.nodes[host]["devices"])
        sets = [[device] for device in sorted(devices, key=lambda device: -self.free[host][device["id"]])]
        for kind in dict.fromkeys(backend(device) for device in devices):
            group = [device for device in devices if backend(device) == kind]
            if len(group) > 1:
                sets.append(group)
        return sets if gpu_only else [*sets, []]

    def shares(self, host: str, devices: list[dict[str, Any]], need: dict[str, int]) -> dict[str, int] | None:
        """Return how many MiB a server takes of each device (or of the host), or None where there is no room."""
        free = self.free[host]
        if not devices:
            total = need["weights"] + need["kv"] + HOST_OVERHEAD_MIB
            return {"host": total} if total <= free["host"] else None
        spread = need["weights"] + need["kv"]
        usable = {device["id"]: max(free[device["id"]] - need["overhead"], 0) for device in devices}
        total = sum(usable.values())
        if spread > total or not total:
            return None
        return {name: -(-spread * size // total) + need["overhead"] for name, size in usable.items()}

    def take(self, host: str, shares: dict[str, int]) -> None:
        """Note what a placed server takes."""
        for name, size in shares.items():
            self.free[host][name] -= size


def overhead(devices: list[dict[str, Any]]) -> int:
    """Return what one process takes of a device besides weights and cache, in MiB."""
    if not devices:
        return HOST_OVERHEAD_MIB
    return EMULATED_OVERHEAD_MIB if devices[0]["vendor"] == "emulated" else GPU_OVERHEAD_MIB


def contexts(model: dict[str, Any], shape: dict[str, Any]) -> list[int]:
    """Return the context lengths to try, in tokens (declaration.md).

    The declared ones, else the trained length halving down.
    """
    trained = int(shape.get("context_length") or LEAST_CONTEXT)
    if model["context"]:
        return model["context"]
    if model["mode"] == "embedding":
        return [min(trained, LEAST_CONTEXT)]
    steps = [min(trained, LAST_CONTEXT)]
    while steps[-1] // 2 >= LEAST_CONTEXT:
        steps.append(steps[-1] // 2)
    return steps


def server_options(
    model: dict[str, Any], devices: list[dict[str, Any]], shares: dict[str, int], context: int, slots: int, kv: str
) -> dict[str, Any]:
    """Return the llama-server options that the plan sets, the owner's C(args) included."""
    options: dict[str, Any] = {
        "ctx-size": context * slots,
        "parallel": slots,
        "n-gpu-layers": ALL_LAYERS if devices else 0,
        "cache-type-k": kv,
        "cache-type-v": kv,
    }
    if len(devices) > 1:
        options["tensor-split"] = [shares[device["id"]] for device in devices]
    if model["mode"] == "embedding":
        # The whole text is one batch for an embedding: a prompt longer than the physical batch is refused.
        options |= {"batch-size": context, "ubatch-size": context}
    return {**options, **model["args"]}


class Planner:
    """Makes one plan."""

    def __init__(self, nodes: dict[str, dict[str, Any]], previous: list[dict[str, Any]]) -> None:
        self.room = Room(nodes)
        self.nodes = nodes
        self.previous = previous
        self.instances: list[dict[str, Any]] = []
        self.refused: list[dict[str, str]] = []
        # Names of servers that will stay are kept for them; new ones take others.
        self.names = {instance["name"] for instance in previous}
        self.kept: set[str] = set()

    def homes(self, model: dict[str, Any]) -> list[str]:
        """Return the nodes on which a model may run, in the order in which they are tried."""
        allowed = [host for host in model["nodes"] or self.nodes if host in self.nodes]
        if model["nodes"] is None and model["replicas"] != "each":
            allowed = [host for host in allowed if self.nodes[host]["presence"] == "always"]
        before = [instance["node"] for instance in self.previous if instance["model"] == model["name"]]
        return sorted(allowed, key=lambda host: (host not in before, allowed.index(host)))

    def place(self, model: dict[str, Any], resolved: dict[str, Any]) -> None:
        """Place all replicas of a model, or say why one has no place."""
        homes = self.homes(model)
        wanted = len(homes) if model["replicas"] == "each" else model["replicas"]
        if model["replicas"] == "each":
            for host in homes:
                self.place_one(model, resolved, [host])
            return
        used: list[str] = []
        for _number in range(wanted):
            host = self.place_one(model, resolved, [host for host in homes if host not in used])
            if host is None:
                return
            used.append(host)

    def place_one(self, model: dict[str, Any], resolved: dict[str, Any], homes: list[str]) -> str | None:
        """Place one server on the first node with room; GPUs of all nodes come before the processor of any."""
        shape = resolved["shape"]
        size = sum(file["size"] for file in resolved["files"])
        ladder = list(itertools.product(model["slots"], model["kv"], contexts(model, shape)))
        tries = self.before(model, homes) + [
            (host, devices) for host in homes for devices in self.room.candidates(host, gpu_only=True)
        ]
        tries += [(host, []) for host in homes]
        least: tuple[int, str] | None = None
        for host, devices in tries:
            for slots, kv, context in ladder:
                need = estimate(shape, size, context, slots, kv, overhead(devices))
                shares = self.room.shares(host, devices, need)
                if shares is None:
                    free = (
                        sum(self.room.free[host][device["id"]] for device in devices)
                        if devices
                        else self.room.free[host]["host"]
                    )
                    what = " and ".join(device["id"] for device in devices) or "its main memory"
                    deficit = need["total"] - free
                    if least is None or deficit < least[0]:
                        reason = (
                            f"it needs {need['total']} MiB at {context} tokens and {slots} slot(s), "
                            f"and {what} of {host} has {free} MiB free"
                        )
                        least = (deficit, reason)
                    continue
                self.room.take(host, shares)
                self.add(
                    model, resolved, host, devices, shares, server_options(model, devices, shares, context, slots, kv)
                )
                return host
        silent = [host for host in model["nodes"] or [] if host not in self.nodes]
        missing = (
            f"{', '.join(silent)} did not answer and declares no hardware"
            if silent
            else "no node that may run it is left"
        )
        reason = least[1] if least else missing
        self.refused.append(
            {
                "model": model["name"],
                "reason": f"{reason}; lower context or slots, choose a smaller file, or allow other nodes",
            }
        )
        return None

    def before(self, model: dict[str, Any], homes: list[str]) -> list[tuple[str, list[dict[str, Any]]]]:
        """Return where servers of the model ran before: a card that became emptier elsewhere is no reason to move."""
        found = []
        for instance in self.previous:
            if instance["model"] == model["name"] and instance["node"] in homes and instance["name"] not in self.kept:
                own = {device["id"]: device for device in self.nodes[instance["node"]]["devices"]}
                if instance["devices"] and all(name in own for name in instance["devices"]):
                    found.append((instance["node"], [own[name] for name in instance["devices"]]))
        return found

    def add(
        self,
        model: dict[str, Any],
        resolved: dict[str, Any],
        host: str,
        devices: list[dict[str, Any]],
        shares: dict[str, int],
        options: dict[str, Any],
    ) -> None:
        """Write down one placed server."""
        name = self.name(model["name"], host)
        self.instances.append(
            {
                "name": name,
                "model": model["name"],
                "mode": model["mode"],
                "node": host,
                "backend": backend(devices[0]) if devices else "cpu",
                "devices": [device["id"] for device in devices],
                "port": None,
                "server_options": options,
                "memory": shares,
                "library": in_place(resolved["files"], self.nodes[host]["library"]),
            }
        )

    def name(self, model: str, host: str) -> str:
        """Return the server's name: the one it had on this node, else the model's name, numbered from the second on."""
        for instance in self.previous:
            if instance["model"] == model and instance["node"] == host and instance["name"] not in self.kept:
                self.kept.add(instance["name"])
                return instance["name"]
        numbered = (model if number == 1 else f"{model}-{number}" for number in itertools.count(1))
        name = next(name for name in numbered if name not in self.names)
        self.names.add(name)
        return name

    def ports(self, models: dict[str, dict[str, Any]]) -> None:
        """Give every server its port: the declared one, the one it had, else the first free one."""
        had = {(instance["name"], instance["node"]): instance["port"] for instance in self.previous}
        taken = {host: set(node.get("ports", [])) for host, node in self.nodes.items()}
        for instance in self.instances:
            port = models[instance["model"]]["port"] or had.get((instance["name"], instance["node"]))
            if port and port not in taken[instance["node"]]:
                instance["port"] = port
                taken[instance["node"]].add(port)
        for instance in self.instances:
            if instance["port"] is None:
                instance["port"] = next(
                    port for port in itertools.count(FIRST_PORT) if port not in taken[instance["node"]]
                )
                taken[instance["node"]].add(instance["port"])


def in_place(files: list[dict[str, Any]], library: list[dict[str, Any]]) -> dict[str, str] | None:
    """Return C({library, path}) of the first file where all files of a model lie in one library of a node, else None.

    A file counts as the same when name and size agree, and the digests where both are known.
    """
    for directory in dict.fromkeys(entry["library"] for entry in library):
        own: dict[str, dict[str, Any]] = {}
        for entry in library:
            if entry["library"] == directory:
                for file in entry["shards"] or [entry]:
                    own.setdefault(file["name"], file)
        found = [own.get(file["name"].rsplit("/", 1)[-1]) for file in files]
        if found and all(entry and _same(file, entry) for file, entry in zip(files, found)):
            return {"library": directory, "path": found[0]["path"]}
    return None


def _same(file: dict[str, Any], entry: dict[str, Any]) -> bool:
    both = file.get("sha256"), entry.get("sha256")
    return file["size"] == entry["size"] and (None in both or both[0] == both[1])


def plan(
    models: dict[str, dict[str, Any]],
    resolved: dict[str, dict[str, Any]],
    nodes: dict[str, dict[str, Any]],
    previous: list[dict[str, Any]],
    unresolved: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Return C({instances, refused}).

    :param models: the registry in normal form, in the order in which models are served (lab.models).
    :param resolved: per model C({files: [{name, size, sha256}], shape}); a model without an entry is refused.
    :param nodes: per inference node C({devices, memory_mib, presence, library, ports, reservations}), sizes in MiB.
    :param previous: the instances of the plan in force.
    :param unresolved: per model without files the reason why.
    """
    planner = Planner(nodes, [instance for instance in previous if instance["model"] in models])
    for name, model in models.items():
        if name in resolved:
            planner.place(model, resolved[name])
        else:
            planner.refused.append({"model": name, "reason": (unresolved or {}).get(name, "its files are not known")})
    planner.ports(models)
    return {"instances": planner.instances, "refused": planner.refused}
