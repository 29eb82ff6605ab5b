# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Writes down what llama-server says of weights and caches, for the tests that run without it.

    pytest tests/integration/record_memory.py       # about 5 minutes; writes tests/unit/fixtures/memory/engine.json

One scaled model for each kind of cache, loaded for real, and some models of the shapes that people run, with their
quantised weights.
"""

from __future__ import annotations

import json
import subprocess
import sys

from ansible_collections.homelab.inference.plugins.module_utils import gguf

from tests.integration import architecture_files, test_memory_architectures

ROOT = architecture_files.ROOT
FIXTURE = ROOT / "tests/unit/fixtures/memory/engine.json"
SCALED = (
    "gemma2-dense",
    "cohere2moe-moe",
    "mimo2-moe",
    "llama4-moe",
    "deepseek2-moe",
    "deepseek4-moe",
    "dots3note-moe",
    "minimax-m3-moe",
    "mamba2-dense",
    "falcon-h1-dense",
    "nemotron_h-dense",
    "lfm2-dense",
    "kimi-linear-moe",
    "glm5-next-moe",
    "qwen4exp-moe",
    "minimax-01-moe",
)
SHAPED = (
    "llama-3.2-1b",
    "gemma-3-12b",
    "gemma-4-26b-a4b",
    "gpt-oss-20b",
    "deepseek-v3",
    "glm-4.5-air",
    "qwen3-next-80b-a3b",
    "nomic-embed-text-v1.5",
)


def run_layouts(shape):
    """As people run them."""
    layers = shape["block_count"]
    yield "one", {"ctx-size": 20000, "parallel": 2, "n-gpu-layers": "all"}, 1
    split = {"ctx-size": 30000, "parallel": 3, "kv-unified": True, "n-gpu-layers": "all", "tensor-split": [1, 2]}
    yield "split", split, 2
    part = {"ctx-size": 16384, "parallel": 1, "n-gpu-layers": layers // 2}
    yield "part", {**part, "cache-type-k": "q8_0", "cache-type-v": "q8_0"}, 1
    yield "processor", {"ctx-size": 16384, "parallel": 1}, 0
    if shape["expert_bytes"]:
        yield "experts", {"ctx-size": 16384, "parallel": 1, "n-gpu-layers": "all", "n-cpu-moe": layers // 2}, 1
        yield "all experts", {"ctx-size": 16384, "parallel": 1, "n-gpu-layers": "all", "cpu-moe": True}, 2


def test_record(tmp_path):
    tiny, scaled, shaped = tmp_path / "tiny", tmp_path / "scaled", tmp_path / "shaped"
    for folder in (tiny, scaled, shaped):
        folder.mkdir()
    cases = []
    for path in architecture_files.write_all(tiny):
        if path.stem in SCALED:
            architecture_files.Scaled(path, 8, 258 << 20).write(scaled / path.name)
            shape = gguf.shape([gguf.read_file(scaled / path.name)])
            for layout, options, devices in test_memory_architectures.layouts(shape):
                tokens = test_memory_architectures.context(shape, options, 64, 1 << 16)
                cases.append((path.stem, shape, layout, {"ctx-size": tokens, **options}, devices))
        path.unlink()
    answers = [(*pair, True) for pair in test_memory_architectures.ask(scaled, cases, loaded=True)]
    subprocess.run([sys.executable, ROOT / "tests/models/synthetic.py", shaped, *SHAPED], check=True)
    cases = []
    for path in sorted(shaped.glob("*.gguf")):
        shape = gguf.shape([gguf.read_file(path)])
        cases += [
            (path.stem, shape, layout, {"load-mode": "none", **options}, devices)
            for layout, options, devices in run_layouts(shape)
        ]
    answers += [(*pair, False) for pair in test_memory_architectures.ask(shaped, cases, loaded=False)]
    models = {}
    for (name, shape, layout, options, devices), answer, loaded in answers:
        kept = {key: value for key, value in shape["hparams"].items() if value or value is False}
        model = models.setdefault(name, {"shape": {**shape, "hparams": kept}, "loaded": loaded, "answers": []})
        found = {
            where: {kind: size for kind, size in kinds.items() if kind not in ("compute", "output")}
            for where, kinds in answer.items()
        }
        model["answers"].append({"layout": layout, "options": options, "devices": devices, "found": found})
    lines = [f"{json.dumps(name)}: {json.dumps(model, separators=(',', ':'))}" for name, model in models.items()]
    FIXTURE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
