# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""All the ways in which a model may run: each step of its owner's lists, on each set of devices, with what it takes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ansible_collections.homelab.inference.plugins.module_utils.planner.footprint import Footprints
from ansible_collections.homelab.inference.plugins.module_utils.planner.quality import quality
from ansible_collections.homelab.inference.plugins.module_utils.planner.room import Room, backend, worth_using

LAST_CONTEXT = 32768
LEAST_CONTEXT = 8192
# All layers, more than any model has; llama-server's own spelling of it is "all".
ALL_LAYERS = "all"
# How finely layers and experts are moved to the processor, and layers dealt out between two cards.
PARTS = 8
# Up to so many cards of one kind in a node every subset is tried, above it only neighbours.
ALL_SUBSETS = 4
# On a node whose memory is counted to the MiB, what grows while a server runs has a bound: no prompt cache beside the
# slots (its default is 8 GiB for each server), and few snapshots of sliding windows and recurrent states (32 by
# default, each as large as the state itself).
CACHE_RAM_MIB = 0
CHECKPOINTS = 2


@dataclass(frozen=True)
class Step:
    """What is taken from the owner's lists: positions and values."""

    quant: int
    context: int
    kv: str
    slots: int
    positions: tuple[int, int, int, int]  # in the lists quant, context, kv, slots


@dataclass(frozen=True)
class Place:
    """Where a server runs on a node."""

    host: str
    devices: tuple[str, ...]
    fit: str
    share: float = 0.0  # the part of the experts or layers on the processor
    split: tuple[int, ...] = ()


@dataclass(frozen=True)
class Choice:
    """A step at a place: one way to run."""

    step: Step
    place: Place
    turns: bool
    quality: float
    memory: dict[str, int]
    needs: tuple[tuple[int, int], ...]


def variants(resolved: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the files of each quant that may run, in order of preference."""
    return resolved.get("variants") or [resolved]


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


def steps(model: dict[str, Any], resolved: dict[str, Any]) -> list[Step]:
    """Return all combinations of what the owner's lists allow."""
    found = []
    for number, variant in enumerate(variants(resolved)):
        lists = (contexts(model, variant["shape"]), model["kv"], model["slots"])
        for (c, context), (k, kv), (s, slots) in itertools.product(*(list(enumerate(one)) for one in lists)):
            found.append(Step(number, context, kv, slots, (number, c, k, s)))
    return found


def server_options(model: dict[str, Any], step: Step, place: Place, shape: dict[str, Any]) -> dict[str, Any]:
    """Return the llama-server options that the plan sets, the owner's C(args) included."""
    layers = int(shape.get("block_count") or 1)
    gpu_layers: int | str = ALL_LAYERS if place.devices else 0
    if place.fit == "layers_on_cpu":
        # The output layer is one more, and is the first on the GPU.
        gpu_layers = layers + 1 - round(layers * place.share)
    options: dict[str, Any] = {
        "ctx-size": step.context * step.slots,
        "parallel": step.slots,
        "kv-unified": False,
        "n-gpu-layers": gpu_layers,
        "cache-type-k": step.kv,
        "cache-type-v": step.kv,
        "kv-offload": True,
        "flash-attn": "on",
        "swa-full": False,
        "batch-size": 2048,
        "ubatch-size": 512,
        "load-mode": "auto",
        "repack": True,
        "cache-ram": CACHE_RAM_MIB,
        "ctx-checkpoints": CHECKPOINTS,
    }
    if shape.get("expert_count"):
        options["n-cpu-moe"] = round(layers * place.share) if place.fit == "experts_on_cpu" else 0
    if len(place.devices) > 1:
        options |= {"split-mode": "layer", "tensor-split": list(place.split)}
    if model["mode"] == "embedding":
        # The whole text is one batch for an embedding: a prompt longer than the physical batch is refused.
        options |= {"batch-size": step.context, "ubatch-size": step.context}
    return {**options, **model["args"]}


def device_sets(room: Room, host: str) -> list[list[dict[str, Any]]]:
    """Return the sets of devices that one server may use on a node: of one backend, large cards first."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for device in worth_using(room.nodes[host]["devices"]):
        groups.setdefault(backend(device), []).append(device)
    found: list[list[dict[str, Any]]] = []
    for group in groups.values():
        # Stable: equal cards keep the order of their ids.
        group.sort(key=lambda device: -room.sizes[room.bins[host, device["id"]]])
        for size in range(1, len(group) + 1):
            if len(group) <= ALL_SUBSETS:
                found += [list(chosen) for chosen in itertools.combinations(group, size)]
            else:
                found += [group[start : start + size] for start in range(len(group) - size + 1)]
    return found


def splits(room: Room, host: str, devices: list[dict[str, Any]]) -> list[tuple[int, ...]]:
    """Return the ways to deal layers out to several cards: by their room, and for two cards in eighths."""
    free = room.free()
    by_room = tuple(max(free[room.bins[host, device["id"]]], 0) for device in devices)
    found = [by_room] if min(by_room) > 0 else []
    if len(devices) == 2:
        found += [(number, PARTS - number) for number in range(1, PARTS)]
    return found


def places(room: Room, host: str, shape: dict[str, Any]) -> Iterator[Place]:
    """Yield all places for a model on a node."""
    experts = bool(shape.get("expert_count"))
    for devices in device_sets(room, host):
        names = tuple(device["id"] for device in devices)
        dealt = splits(room, host, devices) if len(devices) > 1 else [()]
        for split in dealt:
            yield Place(host, names, "split" if split else "one_gpu", 0.0, split)
        for split in dealt[:1]:
            for part in range(1, PARTS + 1):
                if experts:
                    yield Place(host, names, "experts_on_cpu", part / PARTS, split)
                if part < PARTS:
                    yield Place(host, names, "layers_on_cpu", part / PARTS, split)
    yield Place(host, (), "cpu")


def choices(
    model: dict[str, Any],
    resolved: dict[str, Any],
    host: str,
    room: Room,
    footprints: Footprints,
    all_of_them: bool = False,
) -> Iterator[Choice]:
    """Yield all ways in which a model fits into a node that is empty but for what others hold.

    :param all_of_them: those too that do not fit, for saying by how much.
    """
    free = room.free()
    own = {device["id"]: device for device in room.nodes[host]["devices"]}
    found = variants(resolved)
    ladder = steps(model, resolved)
    for place in places(room, host, found[0]["shape"]):
        devices = [own[name] for name in place.devices]
        engine = backend(devices[0]) if devices else "cpu"
        for step in ladder:
            variant = found[step.quant]
            options = server_options(model, step, place, variant["shape"])
            memory = footprints.take((model["name"], step.quant), variant, options, devices, engine)
            needs = room.needs(host, memory)
            if not all_of_them and any(size > free[number] for number, size in needs):
                continue
            for turn in (False, True) if "on-demand" in model["keep"] else (False,):
                worth = quality(*step.positions, place.fit, place.share, turn)
                yield Choice(step, place, turn, worth, memory, needs)


def undominated(found: list[Choice]) -> list[Choice]:
    """Return the choices of one model on one node without those that cost as much as a better one or more."""
    kept: list[Choice] = []
    for choice in sorted(found, key=lambda one: -one.quality):
        wanted = choice.needs
        for better in kept:
            if better.turns and (not choice.turns or better.place.devices != choice.place.devices):
                continue
            sizes = dict(wanted)
            if all(size <= sizes.get(number, 0) for number, size in better.needs):
                break
        else:
            kept.append(choice)
    return kept
