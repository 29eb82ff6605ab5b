# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Writes down what the engine itself takes, so that predictions can be tested where there is no engine.

    python3 tests/oracle/record.py [MODEL...]      # all models of tests/models/synthetic.py that are named below

The table lies beside this file. A model's rows are replaced, the others stay. About 25 minutes for everything.
Models under LOOKED_AT were read while the rules of compute buffers were written down; those under UNSEEN were not, and
have other combinations of options.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_name("compute.json")
LOOKED_AT = (
    "llama-3.2-1b",
    "llama-3.1-8b",
    "qwen2.5-7b",
    "qwen3-8b",
    "qwen3-30b-a3b",
    "gpt-oss-20b",
    "gemma-3-12b",
    "deepseek-v3",
    "glm-4.5-air",
    "phi-4",
    "qwen3-next-80b-a3b",
    "gemma-4-26b-a4b",
    "nomic-embed-text-v1.5",
)
UNSEEN = (
    "mistral-small-24b",
    "qwen2.5-32b",
    "qwen3-1.7b",
    "qwen3-coder-30b-a3b",
    "gemma-3-27b",
    "gpt-oss-120b",
    "llama-3.3-70b",
    "qwen2.5-vl-7b",
    "qwen3-embedding-8b",
    "qwen3.5-122b-a10b",
)
BASE = {"ctx-size": 16384, "parallel": 1, "ubatch-size": 512, "flash-attn": "on"}
CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"ctx-size": 4096},
    {"ctx-size": 65536},
    {"ubatch-size": 128},
    {"ubatch-size": 1024},
    {"ubatch-size": 2048},
    {"cache-type-k": "q8_0", "cache-type-v": "q8_0"},
    {"flash-attn": "off"},
    {"flash-attn": "off", "ctx-size": 4096},
    {"parallel": 4},
    {"parallel": 4, "kv-unified": True},
)
SAMPLE = 30  # combinations of an unseen model


def places(shape: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """Where the layers may lie: the number of devices, and the options that say it."""
    half = shape["block_count"] // 2
    both = {"tensor-split": [1, 1]}
    found: list[tuple[int, dict[str, Any]]] = [
        (0, {}),
        (1, {"n-gpu-layers": "all"}),
        (1, {"n-gpu-layers": half}),
        (2, {"n-gpu-layers": "all", **both}),
        (2, {"n-gpu-layers": half, **both}),
    ]
    if shape["expert_count"]:
        found += [
            (1, {"n-gpu-layers": "all", "cpu-moe": True}),
            (2, {"n-gpu-layers": "all", **both, "cpu-moe": True}),
            (1, {"n-gpu-layers": "all", "n-cpu-moe": half}),
        ]
    return found


def grid(name: str, shape: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """The cases of a model."""
    if name in LOOKED_AT:
        return [(devices, {**BASE, **where, **change}) for devices, where in places(shape) for change in CHANGES]
    half = shape["block_count"] // 2
    spread = [*places(shape), (2, {"n-gpu-layers": "all", "tensor-split": [3, 1]}), (1, {"n-gpu-layers": half + 3})]
    combinations = [
        (devices, {"ctx-size": context, "ubatch-size": ubatch, "flash-attn": flash, **slots, **kv, **where})
        for (devices, where), context, ubatch, flash, slots, kv in itertools.product(
            spread,
            (2048, 8192, 24576, 40960, 131072),
            (256, 512, 768, 2048),
            ("on", "on", "off"),
            ({"parallel": 1}, {"parallel": 2}, {"parallel": 3, "kv-unified": True}, {"parallel": 8}),
            ({}, {"cache-type-k": "q8_0", "cache-type-v": "q8_0"}, {"cache-type-k": "q4_0", "cache-type-v": "q4_0"}),
        )
        if flash == "on" or not kv
    ]
    return random.Random(name).sample(combinations, SAMPLE)


def mode(shape: dict[str, Any]) -> str:
    """What the server is started for."""
    return "embedding" if shape["pooling"] else "chat"


def compact(shape: dict[str, Any]) -> dict[str, Any]:
    """The shape without what compute buffers do not depend on."""
    return {key: value for key, value in shape.items() if not key.endswith("_bytes")}


def record(name: str, folder: Path) -> dict[str, Any]:
    """Ask the engine everything about one model."""
    from ansible_collections.homelab.inference.plugins.module_utils import gguf
    from ansible_collections.homelab.inference.tests.oracle.oracle import Case, Oracle, OracleError

    sys.path.insert(0, str(ROOT / "tests" / "models"))
    import synthetic

    path = synthetic.model(name, synthetic.MODELS[name].quants[0], folder)
    shape = gguf.shape([gguf.read_file(path)])
    rows = grid(name, shape)
    cases = [Case(path, options, devices, mode(shape)) for devices, options in rows]
    with Oracle(folder) as oracle:
        answers = oracle.ask_all(cases)
    path.unlink()
    kept = []
    for (devices, options), answer in zip(rows, answers):
        if isinstance(answer, OracleError):
            print(f"{name} {devices} {options}: {str(answer)[:300]}", file=sys.stderr)
            continue
        kept.append(row(devices, options, answer))
    return {"shape": compact(shape), "rows": kept}


def row(devices: int, options: dict[str, Any], answer: dict[str, dict[str, float]]) -> list[Any]:
    """One case and MiB by place: compute, output."""
    found = {
        where: [sizes.get("compute", 0.0), sizes.get("output", 0.0)]
        for where, sizes in sorted(answer.items())
        if sizes.get("compute") or sizes.get("output")
    }
    return [devices, options, found]


def save(table: dict[str, Any]) -> None:
    """One row a line, so that a change of the engine is seen in a diff."""
    lines = []
    for name in sorted(table):
        head = json.dumps(table[name]["shape"], sort_keys=True, separators=(",", ":"))
        rows = ",\n".join(json.dumps(item, separators=(",", ":")) for item in table[name]["rows"])
        lines.append(f'{json.dumps(name)}: {{"shape": {head}, "rows": [\n{rows}\n]}}')
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    """Record the models that are named, else all."""
    sys.path.insert(0, str(ROOT))
    import conftest

    conftest.pytest_configure()
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    for name in sys.argv[1:] or (*LOOKED_AT, *UNSEEN):
        with tempfile.TemporaryDirectory() as folder:
            table[name] = record(name, Path(folder))
        save(table)
        print(f"{name}: {len(table[name]['rows'])} cases", flush=True)


if __name__ == "__main__":
    main()
