# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How long a plan of 40 models on 16 GPUs in 6 hosts takes, and what it is worth beside others' rules.

    python3 tests/bench/placement.py [LABS]

The others get the same labs, the same predictions and the same table of quality; what differs are their rules:

GPUStack  one model after the other, as they are written, each with the first of what its owner allows: one GPU of one
          node; else all GPUs of a node; else part of the layers on one node's GPU; else the processor. Of several nodes
          the one that is fullest afterwards. Nothing is placed again.
Ollama    every node on its own loads one model after the other into 80 % of what is free, the fewest GPUs first, and
          the engine shortens the context first; what does not fit into GPUs is spilled to the processor by layers. The
          latest stays and the oldest makes way: counted is what is loaded after each model was asked for once.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "optimum")]

import conftest  # noqa: E402

conftest.pytest_configure()  # makes the collection's own name known to Python

import fleets  # noqa: E402
from ansible_collections.homelab.inference.plugins.module_utils.placement import plan  # noqa: E402
from ansible_collections.homelab.inference.plugins.module_utils.planner.choices import (  # noqa: E402
    Choice,
    Ways,
    choices,
)
from ansible_collections.homelab.inference.plugins.module_utils.planner.room import Room  # noqa: E402

TARGET_S = 2.0
STAGES = ("one_gpu", "split", "experts_on_cpu", "layers_on_cpu", "cpu")
OLLAMA_PART = 0.8


def ways(fleet: fleets.Fleet, name: str, room: Room, kept: Ways) -> dict[str, list[Choice]]:
    """Return all resident ways of a model, per node."""
    model = fleet.models[name]
    hosts = model["nodes"] or [host for host, node in fleet.nodes.items() if node["presence"] == "always"]
    return {
        host: [one for one in choices(model, fleet.resolved[name], host, room, kept.footprints, False) if not one.turns]
        for host in hosts
    }


def take(free: list[int], choice: Choice, sign: int = -1) -> None:
    """Take the memory of a choice, or give it back."""
    for number, size in choice.needs:
        free[number] += sign * size


def fits(free: list[int], choice: Choice) -> bool:
    """Say whether there is room."""
    return all(size <= free[number] for number, size in choice.needs)


def gpustack(fleet: fleets.Fleet) -> float:
    """Return the value of what GPUStack's rules make resident."""
    room, kept, value = Room(fleet.nodes), Ways(), 0.0
    free = room.free()
    for name in sorted(fleet.models):
        model = fleet.models[name]
        found, used = ways(fleet, name, room, kept), set()
        for _replica in range(model["replicas"]):
            best: Choice | None = None
            for stage in STAGES:
                there = [
                    one
                    for host, some in found.items()
                    if host not in used
                    for one in some
                    if one.place.fit == stage and one.step.positions == (0, 0, 0, 0) and fits(free, one)
                ]
                if there:
                    # The least part in the processor, then the fullest.
                    best = min(there, key=lambda one: (one.place.share, _left(one, free, room)))
                    break
            if best is None:
                break
            take(free, best)
            used.add(best.place.host)
            value += model["priority"] * best.quality
    return value


def _left(choice: Choice, free: list[int], room: Room) -> float:
    return max((free[number] - size) / max(room.sizes[number], 1) for number, size in choice.needs)


def ollama(fleet: fleets.Fleet) -> float:
    """Return the value of what stays resident under Ollama's rules after every model was asked for once."""
    room, kept = Room(fleet.nodes), Ways()
    free = room.free()
    loaded: list[tuple[str, Choice]] = []
    hosts = list(fleet.nodes)
    for number, name in enumerate(sorted(fleet.models)):
        model = fleet.models[name]
        found = ways(fleet, name, room, kept)
        # Whoever runs several hosts with it deals the models out by hand: in turn.
        order = [host for host in hosts[number % len(hosts) :] + hosts[: number % len(hosts)] if host in found]
        for host in order[: model["replicas"]]:
            some = [one for one in found[host] if one.step.positions[0] == 0 and one.step.positions[2:] == (0, 0)]
            chosen = None
            while chosen is None:
                chosen = _loads(some, free)
                old = next((one for one in loaded if one[1].place.host == host), None)
                if chosen is None and old is None:
                    break
                if chosen is None:
                    loaded.remove(old)
                    take(free, old[1], 1)
            if chosen is not None:
                take(free, chosen)
                loaded.append((name, chosen))
    return sum(fleet.models[name]["priority"] * one.quality for name, one in loaded)


def _loads(some: list[Choice], free: list[int]) -> Choice | None:
    """Return how the engine would load: whole on the fewest GPUs within its part, else with layers on the processor."""
    whole = [
        one
        for one in some
        if one.place.fit in ("one_gpu", "split")
        and all(size <= free[number] * OLLAMA_PART for number, size in one.needs)
    ]
    if whole:
        return min(whole, key=lambda one: (one.step.positions[1], len(one.place.devices)))
    part = [one for one in some if one.place.fit in ("layers_on_cpu", "cpu") and fits(free, one)]
    return min(part, key=lambda one: (one.place.fit == "cpu", one.step.positions[1], one.place.share), default=None)


def main() -> int:
    """Print the table; end with 1 where a target is missed."""
    labs = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    rows: list[tuple[Any, ...]] = []
    for number in range(labs):
        fleet = fleets.large(number)
        started = time.process_time()
        made = plan(fleet.models, fleet.resolved, fleet.nodes, [])
        took = time.process_time() - started
        rows.append((number, took, made["value"], gpustack(fleet), ollama(fleet), len(made["refused"])))
    print(f"{'lab':>4} {'seconds':>8} {'value':>8} {'GPUStack':>9} {'Ollama':>8} {'refused':>8}")
    for number, took, value, other, third, refused in rows:
        print(f"{number:>4} {took:>8.2f} {value:>8.0f} {other:>9.0f} {third:>8.0f} {refused:>8}")
    slowest = max(row[1] for row in rows)
    better = all(row[2] > max(row[3], row[4]) for row in rows)
    print(
        f"slowest {slowest:.2f} s (target {TARGET_S} s); worth more than both in every lab: {'yes' if better else 'no'}"
    )
    return 0 if slowest <= TARGET_S and better else 1


if __name__ == "__main__":
    sys.exit(main())
