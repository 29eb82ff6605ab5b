# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Draws registries and nodes, and plans them as playbook plan.yml does."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

from ansible_collections.homelab.inference.plugins.module_utils import placement
from ansible_collections.homelab.inference.plugins.plugin_utils import lab

from tests.fitting.files import LEAST_CONTEXT, MIB, MOST_CONTEXT, File

# All servers of a registry run at the same time on one machine.
MOST_PLANNED_MIB = 4096
WORK_SHARES = (0.5, 1, 1, 1, 2, 4)


@dataclass
class Registry:
    """A registry with its plan."""

    number: int
    emulated: bool  # has GPUs, and uses them
    files: dict[tuple[str, int], File] = field(default_factory=dict)  # by model and variant
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)

    @property
    def instances(self) -> list[dict[str, Any]]:
        return self.plan["instances"]

    def file(self, instance: dict[str, Any]) -> File:
        return self.files[instance["model"], instance["variant"]]

    def budgets(self) -> dict[tuple[str, str], int]:
        """MiB by server and C(host), and by node and device."""
        found: dict[tuple[str, str], int] = {}
        for one in self.instances:
            for where, size in one["memory"].items():
                key = (one["name"], where) if where == "host" else (one["node"], where)
                found[key] = found.get(key, 0) + size
        return found


def draw(random: Random, number: int, files: list[File], emulated: bool, work: float) -> Registry:
    """Draw until a plan has something to run, on a GPU where there shall be one."""
    while True:
        registry = _one(random, number, files, emulated, work)
        used = any(one["devices"] for one in registry.instances)
        if registry.instances and used == emulated and sum(registry.budgets().values()) <= MOST_PLANNED_MIB:
            return registry


def _one(random: Random, number: int, files: list[File], emulated: bool, work: float) -> Registry:
    registry = Registry(number, emulated)
    names = random.sample(sorted({file.name for file in files}), random.randint(1, 4))
    declared, resolved = {}, {}
    for name in names:
        own = [file for file in files if file.name == name]
        random.shuffle(own)
        declared[name] = _declared(random, own, work)
        variants = [
            {
                "commit": None,
                "quant": file.quant,
                "files": [{"name": file.path.name, "size": file.size, "sha256": None}],
                "mmproj": None,
                "shape": file.shape,
            }
            for file in own
        ]
        resolved[name] = variants[0] if len(variants) == 1 else {**variants[0], "variants": variants}
        registry.files.update({(name, index): file for index, file in enumerate(own)})
    registry.nodes = _nodes(random, [file for file in files if file.name in names], emulated)
    models = lab.models({"lab": {"lab_models": declared}})
    registry.plan = placement.plan(models, resolved, registry.nodes, [])
    return registry


def _declared(random: Random, files: list[File], work: float) -> dict[str, Any]:
    """A model as its owner writes it; no context takes longer than it may."""
    file = files[0]
    slots = random.choice((1, 1, 2))
    # Most are quick; a few take their time for a long context.
    work *= random.choice(WORK_SHARES)
    most = MOST_CONTEXT
    while most > LEAST_CONTEXT and file.work(most, slots) > work:
        most //= 2
    # Not only powers of two.
    context = random.choice((most, most, 256 * random.randint(LEAST_CONTEXT // 256, most // 256)))
    return {
        "source": {"file": f"/models/{file.path.name}"},
        "context": random.choice((context, sorted({context, max(LEAST_CONTEXT, context // 2)}, reverse=True))),
        "kv": random.choice(("f16", "q8_0", ["f16", "q8_0"])),
        "slots": slots if slots == 1 else random.choice((2, [2, 1])),
        "priority": random.randint(1, 99),
    }


def _nodes(random: Random, files: list[File], emulated: bool) -> dict[str, dict[str, Any]]:
    """One or two nodes, some of them too small for everything."""
    wanted = sum(file.size for file in files) / MIB + 200 * len(files)
    hosts = ["anna", "berta"][: random.randint(1, 2)]
    nodes = {}
    for host in hosts:
        count = random.randint(1, 2) if emulated and host == hosts[0] else random.randint(0, 2) if emulated else 0
        devices = []
        for index in range(count):
            size = random.choice(files).size / MIB * random.uniform(0.4, 1.5) + 150
            devices.append(
                {
                    "id": f"gpu{index}",
                    "vendor": "emulated",
                    "name": "emulated GPU",
                    "uuid": f"EMU-{host}-{index}",
                    "pci": None,
                    "memory_mib": round(size),
                    "memory_kind": "dedicated",
                    "cap_mib": None,
                    "endpoint": f"{host}-gpu{index}:50052",
                }
            )
        nodes[host] = {
            "devices": devices,
            "memory_mib": round(256 + wanted * random.uniform(0.4, 1.5)),
            "cpus": 1,
            "runtime": "docker",
            "presence": "always",
            "library": [],
            "ports": [],
            "reservations": {},
        }
    return nodes
