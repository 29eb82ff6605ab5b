# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Made-up labs: the same number gives the same lab. The models are real ones (tests/models/synthetic.py)."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))

import synthetic
from ansible_collections.homelab.inference.plugins.plugin_utils import lab

# vendor, name, MiB, kind, cap
CARDS: list[tuple[str, str, int, str, int | None]] = [
    ("nvidia", "NVIDIA GeForce RTX 2080 SUPER", 8192, "dedicated", None),
    ("nvidia", "NVIDIA GeForce RTX 3060", 12288, "dedicated", None),
    ("nvidia", "Quadro RTX 5000", 16384, "dedicated", None),
    ("nvidia", "NVIDIA GeForce RTX 3090", 24576, "dedicated", None),
    ("nvidia", "NVIDIA GeForce RTX 5090", 32607, "dedicated", None),
    ("amd", "AMD Radeon AI PRO R9700", 32624, "dedicated", None),
    ("amd", "AMD Radeon RX 7900 XTX", 24560, "dedicated", None),
]
UNIFIED: list[tuple[str, str, int, str, int | None]] = [
    ("apple", "Apple M3 Ultra", 98304, "unified", 73728),
    ("tegra", "NVIDIA Jetson AGX Orin", 65536, "unified", None),
    ("amd", "AMD Radeon 8060S (Strix Halo)", 131072, "unified", 114688),
]
NAMES = [
    "llama-3.2-1b",
    "llama-3.1-8b",
    "qwen2.5-7b",
    "qwen2.5-14b",
    "qwen2.5-32b",
    "qwen3-1.7b",
    "qwen3-8b",
    "qwen3-30b-a3b",
    "gemma-3-12b",
    "gemma-3-27b",
    "gemma-4-26b-a4b",
    "gpt-oss-20b",
    "gpt-oss-120b",
    "mistral-small-24b",
    "phi-4",
    "llama-3.3-70b",
]
shape = functools.cache(synthetic.shape)


@dataclass
class Fleet:
    """All that a plan is made from."""

    models: dict[str, dict[str, Any]]
    resolved: dict[str, dict[str, Any]]
    nodes: dict[str, dict[str, Any]]


def node(random: Random, cards: int, always: bool) -> dict[str, Any]:
    """Return a node with so many cards; one without any, or with a unified one, has just its memory."""
    unified = cards == 1 and random.random() < 0.25
    if unified:
        kinds = [random.choice(UNIFIED)]
    else:
        # Machines mostly hold cards of one kind.
        first = random.choice(CARDS)
        kinds = [first if random.random() < 0.7 else random.choice(CARDS) for _number in range(cards)]
    devices = []
    for number, (vendor, name, memory, kind, cap) in enumerate(kinds):
        device = {"id": f"gpu{number}", "vendor": vendor, "name": name, "memory_mib": memory, "memory_kind": kind}
        devices.append({**device, "cap_mib": cap, "used_mib": random.choice([0, 0, 0, 300, 2500])})
    memory = kinds[0][2] if unified else random.choice([16384, 32768, 65536, 131072])
    found: dict[str, Any] = {
        "devices": devices,
        "memory_mib": memory,
        "cpus": 8,
        "runtime": "docker",
        "presence": "always" if always or random.random() < 0.85 else "guest",
        "library": [],
        "ports": [],
        "reservations": {},
    }
    if devices and random.random() < 0.15:
        found["reservations"] = {"gpu0": random.choice([2048, 4096])}
    return found


def model(random: Random, hosts: list[str], wide: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what an owner might write of a model, and its files; C(wide) gives it long lists."""
    name = random.choice(NAMES)
    quants = list(synthetic.MODELS[name].quants)
    if len(quants) > 1 and random.random() < 0.6:
        quants = sorted(quants, key=lambda quant: -shape(name, quant)["weights_bytes"])[: random.choice([2, 3])]
    else:
        quants = quants[:1]
    written: dict[str, Any] = {"source": {"hf": f"x/{name}"}, "priority": random.choice([10, 30, 50, 50, 50, 70, 90])}
    contexts = [65536, 32768, 16384, 8192]
    start = random.randrange(3)
    written["context"] = contexts[start : start + random.choice([1, 2, 3] if wide else [1, 2])]
    written["kv"] = random.choice(["f16", ["f16", "q8_0"], "q8_0"])
    written["slots"] = random.choice([1, 1, 2, [2, 1], [4, 2, 1]] if wide else [1, 2, [2, 1]])
    if random.random() < 0.2:
        written["keep"] = random.choice(["on-demand", ["always", "on-demand"]])
    if random.random() < 0.15:
        written["replicas"] = 2
    if random.random() < 0.2:
        written["nodes"] = random.sample(hosts, random.randint(1, len(hosts)))
    written["categories"] = random.choice([[], ["chat"], ["code"], ["chat", "code"]])
    files = [
        {
            "commit": None,
            "quant": quant,
            "files": [{"name": f"{name}-{quant}.gguf", "size": shape(name, quant)["weights_bytes"], "sha256": None}],
            "mmproj": None,
            "shape": shape(name, quant),
        }
        for quant in quants
    ]
    return written, files


def fleet(seed: int, models: int, cards: list[int], wide: bool = False) -> Fleet:
    """Return a lab with so many models, and one node for each number of cards."""
    random = Random(seed)
    nodes = {f"node{number}": node(random, count, number == 0) for number, count in enumerate(cards)}
    written, resolved = {}, {}
    for number in range(models):
        entry, files = model(random, list(nodes), wide)
        written[f"model{number:02}"] = entry
        resolved[f"model{number:02}"] = {**files[0], "variants": files}
    return Fleet(registry(written), resolved, nodes)


def small(seed: int) -> Fleet:
    """Return a lab of up to six models on up to six devices; a node without a card counts as one."""
    random = Random(seed)
    cards = [random.randint(0, 2)]
    while sum(max(count, 1) for count in cards) < random.randint(1, 6):
        cards.append(random.randint(0, 6 - sum(max(count, 1) for count in cards)))
    return fleet(seed + 1_000_000, random.randint(1, 6), cards)


def large(seed: int) -> Fleet:
    """Return a lab of 40 models on 16 GPUs in 6 hosts."""
    return fleet(seed + 2_000_000, 40, [4, 4, 2, 2, 2, 2], wide=True)


def registry(written: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return models in normal form, as an inventory would give them."""
    return lab.models({"lab": {"lab_models": written}})
