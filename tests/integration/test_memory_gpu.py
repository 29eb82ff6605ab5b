# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The table of predictions on a real NVIDIA card, and what its driver takes beside the buffers that the engine names.

    LLAMA_SERVER=/path/to/llama-server pytest -s tests/integration/test_memory_gpu.py

The models are shape-true; their weights are a hole in the file, which is read as zeroes and takes its place on the card
like any others. The overhead is learned from the first model and holds for the others: a row of the table is the sum
that nvidia-smi shows for the process after a long prompt.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from ansible_collections.homelab.inference.plugins.module_utils import gguf, llama_log, llama_server
from ansible_collections.homelab.inference.plugins.module_utils.memory.predict import predict

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
import synthetic

# The real thing beside the emulated GPUs of the other tests: it needs a card, and a build that no package here has.
pytestmark = [
    pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no NVIDIA GPU: nvidia-smi is not there"),
    pytest.mark.skipif("LLAMA_SERVER" not in os.environ, reason="LLAMA_SERVER does not name a CUDA build"),
]
MIB = 1 << 20
SECONDS = 300
# The overhead is learned from the first.
MODELS = ("llama-3.1-8b", "qwen3-30b-a3b", "gemma-3-12b", "gpt-oss-20b", "qwen3-8b")
PLANNED = {"batch-size": 2048, "ubatch-size": 512, "kv-unified": False, "swa-full": False, "load-mode": "auto"}
PLANNED |= {"cache-ram": 0, "ctx-checkpoints": 2, "verbosity": 4}
GRID = (
    {"ctx-size": 8192, "parallel": 1, "flash-attn": "on", "cache-type-k": "f16", "cache-type-v": "f16"},
    {"ctx-size": 32768, "parallel": 4, "flash-attn": "on", "cache-type-k": "q8_0", "cache-type-v": "q8_0"},
    {"ctx-size": 8192, "parallel": 1, "flash-attn": "off", "cache-type-k": "f16", "cache-type-v": "f16"},
    {"ctx-size": 16384, "parallel": 2, "flash-attn": "on", "cache-type-k": "q4_0", "cache-type-v": "q4_0"},
)
KINDS = {"model": "weights", "kv": "kv", "recurrent": "kv", "compute": "compute"}


def card():
    """The first card, as gpu_facts would return it."""
    asked = ["nvidia-smi", "--query-gpu=uuid,name,memory.total", "--format=csv,noheader,nounits", "--id=0"]
    uuid, name, size = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip().split(", ")
    return {"id": "gpu0", "vendor": "nvidia", "uuid": uuid, "name": name, "memory_mib": int(size), "cap_mib": None}


def used(pid):
    """MiB of the card that a process takes."""
    asked = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits", "--id=0"]
    lines = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()
    return sum(int(size) for process, size in (line.split(", ") for line in lines) if int(process) == pid)


def answer(port, path, body=None):
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=SECONDS) as response:
        return json.load(response)


def served(path, options, device, folder):
    """MiB by kind that the engine names for the card, and MiB that the process takes of it after a long prompt."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    instance = {"model_file": path.name, "alias": "m", "port": port, "backend": "cuda", "devices": [device]}
    instance |= {"mode": "chat", "api_key_file": None, "cpus": None, "server_options": options}
    argv = llama_server.arguments(instance)
    argv[argv.index("--model") + 1] = str(path)
    log = folder / "log"
    with log.open("wb") as out:
        server = subprocess.Popen([os.environ["LLAMA_SERVER"], *argv], stdout=out, stderr=out)
        try:
            end = time.monotonic() + SECONDS
            while time.monotonic() < end and server.poll() is None:
                with contextlib.suppress(OSError):
                    if answer(port, "/health")["status"] == "ok":
                        break
                time.sleep(0.2)
            tokens = options["ctx-size"] // options["parallel"] - 64
            prompt = [300 + (7 * index) % 7000 for index in range(tokens)]
            answer(port, "/completion", {"prompt": prompt, "n_predict": 4})
            taken = used(server.pid)
        finally:
            server.kill()
            server.wait()
    sizes = llama_log.of_instance(llama_log.buffers(log.read_text(errors="replace")), ["gpu0"])["gpu0"]
    return sizes, taken


def places(shape):
    """All on the card, half of the layers, and experts on the processor."""
    found = [{"n-gpu-layers": "all"}, {"n-gpu-layers": shape["block_count"] // 2}]
    return [*found, {"n-gpu-layers": "all", "n-cpu-moe": shape["block_count"] // 2}] if shape["expert_count"] else found


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Per case (model, options): the parts that were predicted, the buffers, and what the process took."""
    folder, device, result = tmp_path_factory.mktemp("gpu"), card(), []
    for name in MODELS:
        path = synthetic.model(name, synthetic.MODELS[name].quants[0], folder)
        shape = gguf.shape([gguf.read_file(path)])
        for where in places(shape):
            for given in GRID:
                options = {**PLANNED, **given, **where}
                parts = [part for part in predict(shape, options, [device], "cuda") if part["where"] == "gpu0"]
                sizes, taken = served(path, options, device, folder)
                result.append((name, options, parts, sizes, taken))
        path.unlink()
    return device, result


def said(parts, kinds):
    return sum(part["bytes"] for part in parts if part["kind"] in kinds) / MIB


def took(sizes, kind):
    return sum(size for name, size in sizes.items() if KINDS.get(name) == kind)


def test_weights_and_caches(rows):
    for name, options, parts, sizes, _taken in rows[1]:
        for kind, kinds in (("weights", ("weights",)), ("kv", ("kv", "recurrent"))):
            assert said(parts, kinds) == pytest.approx(took(sizes, kind), abs=1), (name, options, kind)


def test_compute_buffers(rows):
    errors = []
    for name, options, parts, sizes, _taken in rows[1]:
        there = took(sizes, "compute")
        errors.append(abs(said(parts, ("compute",)) - there) / there)
        assert said(parts, ("compute",)) >= there - 8, (name, options)
    errors.sort()
    assert statistics.median(errors) <= 0.02 and errors[int(len(errors) * 0.95)] <= 0.10


def test_what_the_process_takes_with_the_overhead_learned(rows):
    device, found = rows
    beside = [taken - sum(sizes.values()) for name, _options, _parts, sizes, taken in found if name == MODELS[0]]
    overhead = max(beside)
    print(f"\n{device['name']}: {min(beside):.0f} to {overhead:.0f} MiB beside the buffers of {MODELS[0]}")
    errors = []
    for name, options, parts, _sizes, taken in found:
        if name == MODELS[0]:
            continue
        plan = sum(part["bytes"] for part in parts if part["kind"] != "overhead") / MIB + overhead
        errors.append((plan - taken) / taken)
        print(f"{name:20}{plan:9.0f}{taken:9.0f}{100 * errors[-1]:8.2f} %  {options}")
        assert taken - plan <= 0.005 * device["memory_mib"], (name, options)
    shares = [abs(error) for error in errors]
    assert statistics.median(shares) <= 0.005 and max(shares) <= 0.02
