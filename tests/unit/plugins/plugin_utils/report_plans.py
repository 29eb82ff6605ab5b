# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A plan that shows everything a report can show, for the tests of the reports."""

from __future__ import annotations

from typing import Any

MIB = 1 << 20


def part(where: str, kind: str, mib: float, source: str = "computed") -> dict[str, Any]:
    return {"where": where, "kind": kind, "bytes": int(mib * MIB), "source": source}


def instance(name: str, node: str, devices: list[str], parts: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    memory: dict[str, int] = {}
    for one in parts:
        memory[one["where"]] = memory.get(one["where"], 0) + one["bytes"]
    options = {"ctx-size": 65536, "parallel": 2, "n-gpu-layers": "all", "cache-type-k": "f16", "cache-type-v": "f16"}
    return {
        "name": name,
        "model": more.pop("model", name),
        "mode": more.pop("mode", "chat"),
        "node": node,
        "backend": more.pop("backend", "cuda" if devices else "cpu"),
        "devices": devices,
        "port": more.pop("port", 8080),
        "server_options": {**options, **more.pop("options", {})},
        "memory": {where: -(-size // MIB) for where, size in memory.items()},
        "parts": parts,
        "library": None,
        **more,
    }


def card(number: int, name: str, size: int, **more: Any) -> dict[str, Any]:
    return {
        "id": f"gpu{number}",
        "vendor": "nvidia",
        "name": name,
        "memory_mib": size,
        "memory_kind": "dedicated",
        **more,
    }


def everything() -> dict[str, Any]:
    """Two machines with cards, a Mac, and a small one with none; a refusal, turns, a reservation, all sources."""
    instances = [
        instance(
            "qwen3-coder-30b",
            "forge",
            ["gpu0"],
            [
                part("gpu0", "weights", 17500.4),
                part("gpu0", "kv", 3072, "calibrated"),
                part("gpu0", "compute", 405.3, "bound"),
                part("gpu0", "overhead", 460, "measured"),
                part("host", "output", 1.2),
                part("host", "base", 220),
            ],
            quant="Q4_K_M",
            fit="one_gpu",
            quality=0.9,
            start=1,
            turns=[],
        ),
        instance(
            "nomic-embed",
            "forge",
            ["gpu1"],
            [part("gpu1", "weights", 260.9), part("gpu1", "kv", 288), part("gpu1", "compute", 34.1)],
            quant="F16",
            mode="embedding",
            port=8081,
            options={"ctx-size": 8192, "parallel": 1},
            fit="one_gpu",
            start=2,
            turns=[],
        ),
        instance(
            "gpt-oss-120b",
            "mac",
            ["gpu0"],
            [part("gpu0", "weights", 60500), part("gpu0", "kv", 2304), part("gpu0", "compute", 512)],
            quant="MXFP4",
            backend="metal",
            fit="one_gpu",
            start=1,
            turns=["llama-3.3-70b"],
            stop_first=["qwen3-coder-30b"],
        ),
        instance(
            "llama-3.3-70b",
            "mac",
            ["gpu0"],
            [part("gpu0", "weights", 40550), part("gpu0", "kv", 10240), part("gpu0", "compute", 700)],
            quant="Q4_K_M",
            backend="metal",
            port=8081,
            fit="turns",
            start=2,
            turns=["gpt-oss-120b"],
        ),
        instance(
            "nomic-embed-2",
            "nuc",
            [],
            [part("host", "weights", 260.9), part("host", "kv", 288), part("host", "repack", 130)],
            model="nomic-embed",
            quant="F16",
            mode="embedding",
            port=8080,
            options={"ctx-size": 8192, "parallel": 1, "n-gpu-layers": 0},
            fit="cpu",
            start=1,
            turns=[],
        ),
    ]
    return {
        "nodes": {
            "forge": {
                "devices": [card(0, "NVIDIA GeForce RTX 3090", 24576), card(1, "NVIDIA GeForce RTX 3090", 24576)],
                "memory_mib": 65536,
                "reservations": {"gpu1": 8192},
            },
            "mac": {
                "devices": [card(0, "Apple M3 Ultra", 98304, vendor="apple", memory_kind="unified", cap_mib=90112)],
                "memory_mib": 98304,
                "reservations": {},
            },
            "nuc": {"devices": [], "memory_mib": 16384, "reservations": {}},
        },
        "models": {
            "qwen3-coder-30b": {"quant": "Q4_K_M", "files": [{"name": "q.gguf", "size": 1, "sha256": "a"}]},
            "nomic-embed": {"quant": "F16", "files": []},
            "gpt-oss-120b": {"quant": "MXFP4", "files": []},
        },
        "instances": instances,
        "refused": [
            {
                "model": "llama-4-maverick",
                "reason": "it needs 223104 MiB, and gpu0 of mac has 26796 MiB free",
                "node": "mac",
                "device": "gpu0",
                "needed_mib": 223104,
                "available_mib": 26796,
                "deficit_mib": 196308,
                "change": {
                    "key": "lab_models.llama-4-maverick.source.quant",
                    "value": "IQ1_S",
                    "sentence": "set lab_models.llama-4-maverick.source.quant to IQ1_S.",
                },
            }
        ],
        "devices": {
            "forge": {
                "gpu0": {
                    "size_mib": 24576,
                    "reserved_mib": 500,
                    "others_mib": 320,
                    "planned_mib": 21438,
                    "left_mib": 2318,
                },
                "gpu1": {
                    "size_mib": 24576,
                    "reserved_mib": 8692,
                    "others_mib": 0,
                    "planned_mib": 583,
                    "left_mib": 15301,
                },
                "host": {
                    "size_mib": 65536,
                    "reserved_mib": 1024,
                    "others_mib": 0,
                    "planned_mib": 222,
                    "left_mib": 64290,
                },
            },
            "mac": {
                "gpu0": {
                    "size_mib": 90112,
                    "reserved_mib": 512,
                    "others_mib": 0,
                    "planned_mib": 63316,
                    "left_mib": 26284,
                }
            },
            "nuc": {
                "host": {
                    "size_mib": 16384,
                    "reserved_mib": 1024,
                    "others_mib": 0,
                    "planned_mib": 679,
                    "left_mib": 14681,
                }
            },
        },
        "survival": [
            {
                "lost": "forge",
                "keeps": ["gpt-oss-120b", "nomic-embed"],
                "loses": ["qwen3-coder-30b"],
                "sentence": "Without forge: gpt-oss-120b and nomic-embed go on, qwen3-coder-30b is gone.",
            }
        ],
        "order": {
            "forge": ["qwen3-coder-30b", "nomic-embed"],
            "mac": ["gpt-oss-120b", "llama-3.3-70b"],
            "nuc": ["nomic-embed-2"],
        },
        "value": 131.5,
    }
