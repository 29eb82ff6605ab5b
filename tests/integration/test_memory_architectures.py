# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Weights and caches of every architecture that llama.cpp knows, beside what llama-server itself says.

The files of test-llama-archs are scaled up to 2 GiB of weights and caches of as much, so that the whole MiB that the
engine's dry pass prints are a tenth of a percent. Some are also loaded, which prints hundredths of a MiB; with
LOAD_ALL=1 in the environment all of them are, with LOAD_ALL=layouts in every layout (half an hour).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ansible_collections.homelab.inference.plugins.module_utils import gguf
from ansible_collections.homelab.inference.plugins.module_utils.memory.cache import cache, unknown
from ansible_collections.homelab.inference.plugins.module_utils.memory.weights import repacked, weights

from tests.integration import architecture_files
from tests.oracle.oracle import Case, Oracle, OracleError

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
GPUS = [{"id": f"gpu{index}", "vendor": "emulated", "memory_mib": 8192} for index in range(2)]
KINDS = {"weights": "model", "repack": "repack", "kv": "kv", "recurrent": "recurrent"}
WHOLE = ("weights", "repack", "kv")  # in the dry pass: whole MiB, rounded down
# One of each kind of cache.
LOADED = (
    "llama-dense",
    "gemma2-dense",
    "gpt-oss-moe",
    "llama4-moe",
    "cohere2moe-moe",
    "mimo2-moe",
    "deepseek2-moe",
    "deepseek32-moe",
    "deepseek4-moe",
    "glm-dsa-moe",
    "dots3note-moe",
    "minimax-m3-moe",
    "mamba-dense",
    "mamba2-dense",
    "jamba-dense",
    "falcon-h1-dense",
    "nemotron_h-dense",
    "lfm2-dense",
    "qwen3next-moe",
    "qwen4exp-moe",
    "glm5-next-moe",
    "kimi-linear-moe",
    "minimax-01-moe",
    "hrm_text-dense",
)


def cache_type(name, shape):
    """What the engine takes: rows of whole blocks, and with flash attention only, which one architecture has not."""
    if shape["key_length"] % 32 or shape["value_length"] % 32:
        return {"cache-type-k": "bf16", "cache-type-v": "f32"}
    return {"cache-type-k": "q8_0"} if name == "grok" else {"cache-type-k": "q8_0", "cache-type-v": "q8_0"}


def layouts(shape):
    """Name, options, devices."""
    for name, options, devices in _layouts(shape):
        # The dry pass never maps the file; what is mapped is printed as the part of the file between two tensors.
        yield name, {"load-mode": "none", "warmup": False, **options}, devices


def _layouts(shape):
    layers = shape["block_count"]
    yield "unified", {"parallel": 3, "kv-unified": True, "n-gpu-layers": "all"}, 1
    yield "slots", {"parallel": 4, "n-gpu-layers": "all", "tensor-split": [3, 2]}, 2
    quantised = cache_type(shape["architecture"], shape)
    yield "quantised", {"parallel": 1, "n-gpu-layers": layers // 2 + 1, **quantised}, 1
    yield "swa-full", {"parallel": 2, "swa-full": True}, 0
    if shape["expert_bytes"]:
        experts = {"n-cpu-moe": layers // 3, "flash-attn": "off", "n-gpu-layers": layers - 1, "kv-offload": False}
        yield "experts", {"parallel": 1, **experts, "tensor-split": [1, 2]}, 2


def predicted(shape, options, devices):
    """MiB by place and kind."""
    gpus = GPUS[:devices]
    result = Counter()
    for part in weights(shape, options, gpus) + cache(shape, options, gpus):
        if part["kind"] != "draft":  # a context of its own, with a table of its own
            result[part["where"], part["kind"]] += part["bytes"] / MIB
    result["host", "repack"] = repacked(shape, options, gpus) / MIB
    return result


def measured(answer):
    return Counter({(where, kind): answer[where].get(theirs, 0) for where in answer for kind, theirs in KINDS.items()})


def differences(expected, answer, loaded):
    """Where, what, predicted, measured: beyond 0.1 % or 0.05 MiB, or beyond what a rounded number says."""
    found = measured(answer)
    wrong = []
    for key in sorted({*expected, *found}):
        error = expected[key] - found[key]
        rounded = not loaded and key[1] in WHOLE and -0.05 <= error < 1.05
        if abs(error) > max(0.05, found[key] / 1000) and not rounded:
            wrong.append((*key, round(expected[key], 2), found[key]))
    return wrong


def context(shape, options, least, most):
    """Tokens, so many that the cache has that many MiB; an odd number of them."""
    tokens = least // 16 * 16 + 1016
    while tokens < most:
        size = sum(part["bytes"] for part in cache(shape, {**options, "ctx-size": tokens}, []) if part["kind"] == "kv")
        if size >= least * MIB:
            break
        tokens *= 2
    return min(tokens, most)


def ask(folder, cases, loaded):
    """Answers to (name, shape, layout, options, devices), from two containers: there are two cores."""
    questions = [
        Case(folder / f"{name}.gguf", options, devices, load=loaded)
        for name, _shape, _layout, options, devices in cases
    ]

    def half(number):
        with Oracle(folder) as oracle:
            return oracle.ask_all(questions[number::2])

    with ThreadPoolExecutor(2) as pool:
        halves = list(pool.map(half, range(2)))
    answers = [None] * len(cases)
    answers[0::2], answers[1::2] = halves
    return list(zip(cases, answers))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    yield architecture_files.write_all(folder)
    for path in folder.iterdir():
        path.unlink()


@pytest.fixture(scope="module")
def large(tiny, tmp_path_factory):
    """Shapes by name, in files with 2 GiB of holes."""
    folder = tmp_path_factory.mktemp("large")
    shapes = {}
    for path in tiny:
        architecture_files.Scaled(path, 64, 2100 * MIB).write(folder / path.name)
        shapes[path.stem] = gguf.shape([gguf.read_file(folder / path.name)])
    yield folder, shapes
    for path in folder.iterdir():
        path.unlink()


@pytest.fixture(scope="module")
def answers(large):
    folder, shapes = large
    cases = [
        (name, shape, layout, {"ctx-size": context(shape, options, 2200, 1 << 18), **options}, devices)
        for name, shape in shapes.items()
        for layout, options, devices in layouts(shape)
    ]
    return ask(folder, cases, loaded=False)


def report(answers, layout, loaded=False):
    wrong, right = [], 0
    for (name, shape, own, options, devices), answer in answers:
        if own == layout:
            if isinstance(answer, OracleError):
                wrong.append(f"{name}: {answer}")
            else:
                found = differences(predicted(shape, options, devices), answer, loaded)
                wrong += [f"{name} {options}: {found}"] if found else []
                right += not found
    print(f"{layout}: {right} of {right + len(wrong)} hold")
    return wrong


def test_all_architectures_are_known(large):
    _folder, shapes = large
    assert len(shapes) >= 131
    assert {name: unknown(shape) for name, shape in shapes.items() if unknown(shape)} == {}


@pytest.mark.parametrize("layout", ["unified", "slots", "quantised", "swa-full", "experts"])
def test_every_architecture(answers, layout):
    assert report(answers, layout) == []


def test_wrong_numbers_would_show(answers):
    """What is right for one architecture is wrong for the next one, and nothing is wrong for all."""
    given = [(case, answer) for case, answer in answers if not isinstance(answer, OracleError)]
    assert all(differences(Counter(), answer, loaded=False) for _case, answer in given)
    next_one = [
        differences(predicted(other[1], case[3], case[4]), answer, loaded=False)
        for (case, answer), (other, _answer) in zip(given, given[7:])
    ]
    assert sum(1 for found in next_one if found) > 0.9 * len(next_one)


def test_to_the_hundredth(tiny, tmp_path):
    """Loaded for real, over two devices."""
    cases = []
    wanted = os.environ.get("LOAD_ALL")
    for path in tiny:
        if path.stem in LOADED or wanted:
            architecture_files.Scaled(path, 8, 258 * MIB).write(tmp_path / path.name)
            shape = gguf.shape([gguf.read_file(tmp_path / path.name)])
            for layout, options, devices in layouts(shape):
                if layout == "slots" or wanted == "layouts":
                    tokens = context(shape, options, 64, 1 << 16)
                    cases.append((path.stem, shape, layout, {"ctx-size": tokens, **options}, devices))
    found = ask(tmp_path, cases, loaded=True)
    assert {layout: wrong for layout in {case[2] for case in cases} if (wrong := report(found, layout, True))} == {}


def test_what_no_tiny_model_has(tiny, tmp_path):
    """Quantised and tied weights, shared caches, layers gone through twice, layers that predict further tokens."""
    names = ("llama-3.2-1b", "gemma-4-26b-a4b", "glm-4.5-air", "nomic-embed-text-v1.5")
    subprocess.run([sys.executable, ROOT / "tests/models/synthetic.py", tmp_path, *names], check=True)
    loops = next(path for path in tiny if path.stem == "nanbeige-dense")
    architecture_files.Scaled(loops, 64, 2100 * MIB).write(tmp_path / loops.name)
    # Numbers that the server is told to find in the file.
    told = {"gemma4": {"attention.shared_kv_layers": 12}, "nanbeige": {"num_loops": 2}}
    plain = {"load-mode": "none", "warmup": False, "ctx-size": 40000, "parallel": 2}
    cases = []
    for path in sorted(tmp_path.glob("*.gguf")):
        shape = gguf.shape([gguf.read_file(path)])
        architecture = shape["architecture"]
        options = dict(plain)
        for key, number in told.get(architecture, {}).items():
            options["override-kv"] = f"{architecture}.{key}=int:{number}"
            shape["hparams"][key] = number
        if architecture == "glm4moe":
            options["spec-type"] = "draft-mtp"
        part = {"n-gpu-layers": shape["block_count"] // 2, "flash-attn": "off", "tensor-split": [2, 1]}
        cases.append((path.stem, shape, "part", {**options, **part}, 2))
        cases.append((path.stem, shape, "processor", options, 0))
    found = ask(tmp_path, cases, loaded=False)
    assert {layout: wrong for layout in {case[2] for case in cases} if (wrong := report(found, layout))} == {}
    assert len(cases) == 10
