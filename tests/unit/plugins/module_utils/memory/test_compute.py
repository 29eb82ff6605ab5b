# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Compute buffers from the header alone, against what the engine said of the same models and options.

tests/oracle/record.py asks the engine; here neither it nor Docker is needed.
"""

from __future__ import annotations

import functools
import json
import statistics
from pathlib import Path

import pytest
from ansible_collections.homelab.inference.plugins.module_utils.memory import compute as subject
from ansible_collections.homelab.inference.plugins.module_utils.memory.compute import compute

MIB = 1 << 20
TABLE = json.loads((Path(__file__).parents[4] / "oracle" / "compute.json").read_text())
# The first four were recorded when the rules were finished. The others taught one rule (a batch is rounded up to a
# multiple of the sequences) and one architecture that was not among those looked at (qwen35moe).
UNSEEN = (
    "llama-3.3-70b",
    "qwen3-1.7b",
    "qwen2.5-vl-7b",
    "qwen3-embedding-8b",
    "mistral-small-24b",
    "qwen2.5-32b",
    "gemma-3-27b",
    "gpt-oss-120b",
    "qwen3-coder-30b-a3b",
    "qwen3.5-122b-a10b",
)


def devices(count):
    return [{"id": f"gpu{index}", "vendor": "emulated", "memory_mib": 24576} for index in range(count)]


def predicted(shape, options, count):
    """MiB by place: compute, output."""
    if shape["pooling"]:
        options = {**options, "embedding": True}
    found = {}
    for part in compute(shape, options, devices(count), "emulated"):
        found.setdefault(part["where"], {})[part["kind"]] = part["bytes"] / MIB
    return {where: [sizes.get("compute", 0.0), sizes.get("output", 0.0)] for where, sizes in found.items()}


def rows(name):
    """All of an unseen model, every second one of the others; tests/bench/memory.py takes them all."""
    return TABLE[name]["rows"][:: 1 if name in UNSEEN else 2]


@functools.cache
def pairs_of(name):
    """Taken and said MiB of each compute buffer, and of each output buffer."""
    compared, outputs = [], []
    for count, options, taken in rows(name):
        said = predicted(TABLE[name]["shape"], options, count)
        for where, (size, output) in taken.items():
            compared.append((size, said[where][0]))
            outputs.append((output, said[where][1]))
    return compared, outputs


@pytest.mark.parametrize("name", sorted(TABLE))
def test_a_model_in_all_places(name):
    pairs, _outputs = pairs_of(name)
    shares = sorted(abs(said - taken) / max(taken, 1.0) for taken, said in pairs)
    assert len(shares) >= 30
    assert statistics.median(shares) <= 0.002
    assert shares[int(len(shares) * 0.95)] <= 0.01
    assert min(said - taken for taken, said in pairs) >= -8
    assert all(said > 0 for taken, said in pairs if taken >= 0.1)


def test_models_that_were_not_looked_at_are_told_as_well_as_the_others():
    assert len(set(UNSEEN) & set(TABLE)) >= 3
    assert len(set(TABLE) - set(UNSEEN)) >= 11
    pairs = [pair for name in UNSEEN if name in TABLE for pair in pairs_of(name)[0]]
    shares = sorted(abs(said - taken) / max(taken, 1.0) for taken, said in pairs)
    assert statistics.median(shares) <= 0.02
    assert shares[int(len(shares) * 0.95)] <= 0.10
    assert min(said - taken for taken, said in pairs) >= -8


@pytest.mark.parametrize("name", sorted(TABLE))
def test_output_buffers_are_exact(name):
    _pairs, outputs = pairs_of(name)
    assert max(output for output, _said in outputs) > 0.1
    for output, said in outputs:
        assert said == pytest.approx(output, abs=0.01)


def test_what_is_left_out_of_the_layers_changes_nothing(monkeypatch):
    for name in ("gemma-3-12b", "qwen3-next-80b-a3b", "deepseek-v3"):
        shape = TABLE[name]["shape"]
        options = {"ctx-size": 16384, "parallel": 1, "n-gpu-layers": "all", "tensor-split": [1, 1]}
        short = predicted(shape, options, 2)
        with monkeypatch.context() as patch:
            patch.setattr(subject, "_shortened", tuple)
            assert predicted(shape, options, 2) == short


def test_an_unknown_architecture_gets_an_upper_bound_and_says_so():
    for name in ("llama-3.1-8b", "qwen3-30b-a3b", "gemma-3-12b", "qwen3-next-80b-a3b"):
        known = TABLE[name]["shape"]
        strange = {**known, "architecture": "unheard-of"}
        for count, options, taken in TABLE[name]["rows"][::6]:
            parts = compute(strange, options, devices(count), "emulated")
            assert {part["source"] for part in parts} == {"bound"}
            said = {part["where"]: part["bytes"] / MIB for part in parts if part["kind"] == "compute"}
            for where, (size, _output) in taken.items():
                assert said.get(where, 0.0) >= size - 8, (name, where, options)
    assert subject.unknown(strange) and not subject.unknown(known)


def test_a_gpu_that_computes_for_the_processor_needs_room_for_its_weights():
    shape = {**TABLE["llama-3.1-8b"]["shape"], "block_bytes": [140 * MIB] * 32, "expert_bytes": [0] * 32}
    options = {"ctx-size": 8192, "parallel": 1, "n-gpu-layers": 16}
    card = [{"id": "gpu0", "vendor": "nvidia", "memory_mib": 24576}]

    def on_card(options, backend):
        (part,) = [part for part in compute(shape, options, card, backend) if part["where"] == "gpu0"]
        return part["bytes"], part["source"]

    remote, lent = on_card(options, "emulated"), on_card(options, "cuda")
    assert (remote[1], lent[1]) == ("computed", "bound")
    assert lent[0] - remote[0] >= 56 * MIB
    assert on_card({**options, "op-offload": False}, "cuda") == remote
    full = {**options, "n-gpu-layers": "all"}
    assert on_card(full, "cuda") == on_card(full, "emulated")


def test_a_quantised_cache_is_unpacked_on_nvidia_and_amd():
    shape = {**TABLE["llama-3.1-8b"]["shape"], "block_bytes": [140 * MIB] * 32, "expert_bytes": [0] * 32}
    card = [{"id": "gpu0", "vendor": "nvidia", "memory_mib": 24576}]

    def on_card(kind, backend):
        options = {"ctx-size": 65536, "parallel": 1, "n-gpu-layers": "all", "cache-type-k": kind, "cache-type-v": kind}
        (part,) = [part for part in compute(shape, options, card, backend) if part["where"] == "gpu0"]
        return part["bytes"] / MIB

    one_layer = 2 * 65536 * 8 * 128 * 2 / MIB
    assert on_card("f16", "cuda") == on_card("f16", "vulkan")
    # It lies where the feed-forward part lies at another moment.
    assert one_layer / 2 < on_card("q8_0", "cuda") - on_card("q8_0", "vulkan") <= one_layer
    assert on_card("q8_0", "rocm") == on_card("q8_0", "cuda")
