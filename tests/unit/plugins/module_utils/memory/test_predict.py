# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""All parts of a server's memory together."""

from __future__ import annotations

import json

import pytest
from ansible_collections.homelab.inference.plugins.module_utils.memory.cache import cache
from ansible_collections.homelab.inference.plugins.module_utils.memory.compute import compute
from ansible_collections.homelab.inference.plugins.module_utils.memory.host import host
from ansible_collections.homelab.inference.plugins.module_utils.memory.predict import (
    draft_options,
    picture_bytes,
    predict,
    totals,
    unknown,
)
from ansible_collections.homelab.inference.plugins.module_utils.memory.weights import repacked, weights

MIB = 2**20
GPU = {"id": "gpu0", "vendor": "nvidia", "memory_mib": 24576, "cap_mib": None}
OPTIONS = {"ctx-size": 4096, "parallel": 2, "cache-ram": 0, "ctx-checkpoints": 2, "n-gpu-layers": "all"}


def shape(architecture="llama", layers=4, width=1024):
    return {
        "architecture": architecture,
        "context_length": 8192,
        "block_count": layers,
        "embedding_length": width,
        "head_count": 16,
        "head_count_kv": 16,
        "key_length": width // 16,
        "value_length": width // 16,
        "expert_count": 0,
        "expert_used_count": 0,
        "tokenizer": "llama",
        "vocab_size": 32768,
        "tied_output": False,
        "input_bytes": 8 * MIB,
        "embedding_bytes": 8 * MIB,
        "output_bytes": 8 * MIB,
        "other_bytes": 0,
        "weights_bytes": 16 * MIB + layers * 20 * MIB,
        "block_bytes": [20 * MIB] * layers,
        "expert_bytes": [0] * layers,
        "ffn_bytes": [10 * MIB] * layers,
        "repack_bytes": {"Q4_0": {"blocks": [16 * MIB] * layers}},
        "hparams": {"feed_forward_length": 4 * width},
    }


def of(kind, parts):
    return {part["where"]: part["bytes"] for part in parts if part["kind"] == kind}


@pytest.mark.parametrize(("devices", "backend"), [([], "cpu"), ([GPU], "cuda"), ([GPU, {**GPU, "id": "gpu1"}], "rocm")])
def test_every_part_is_counted_once(devices, backend):
    model = shape()
    parts = predict(model, OPTIONS, devices, backend)
    for expected in (
        weights(model, OPTIONS, devices),
        cache(model, OPTIONS, devices),
        compute(model, OPTIONS, devices, backend),
    ):
        assert [part for part in parts if part["kind"] in {one["kind"] for one in expected}] == expected
    base = {part["kind"]: part["bytes"] for part in host(model, OPTIONS, devices, backend)}["base"]
    rest = sum(part["bytes"] for part in parts if part["where"] == "host") - of("base", parts)["host"]
    more = of("base", parts)["host"] - base
    # Entries of page tables, and where weights are kept in another order, a fiftieth to read ahead.
    ahead = (rest + base) // 50 if "host" in of("repack", parts) else 0
    assert (rest + base) // 512 <= more - ahead < (rest + base) // 256
    keys = [(part["where"], part["kind"]) for part in parts]
    assert len(keys) == len(set(keys))
    assert json.loads(json.dumps(parts)) == parts
    assert {where for where, _kind in keys} == {"host", *(device["id"] for device in devices)}


def test_totals_are_rounded_up_once_for_each_place():
    third = {"kind": "x", "bytes": MIB // 3, "source": "computed"}
    assert totals([{**third, "where": "gpu0"}] * 3 + [{**third, "where": "host"}] * 4) == {"gpu0": 1, "host": 2}
    assert totals([]) == {}


def test_a_known_model_has_no_reasons_for_upper_bounds():
    assert unknown(shape()) == []


def test_an_unknown_one_says_why_and_is_counted_higher():
    strange = shape(architecture="llama-of-tomorrow")
    assert unknown(strange)
    ours = totals(predict(shape(), OPTIONS, [GPU], "cuda"))
    theirs = predict(strange, OPTIONS, [GPU], "cuda")
    assert totals(theirs)["gpu0"] >= ours["gpu0"]
    assert {part["source"] for part in theirs if part["kind"] in ("kv", "compute")} == {"bound"}


def test_a_draft_model_lies_beside_its_model():
    small = shape(layers=2, width=256)
    without = predict(shape(), OPTIONS, [GPU], "cuda")
    parts = predict(shape(), OPTIONS, [GPU], "cuda", draft=small)
    beside = ("draft", "base")  # its pages have entries in the page table, too
    assert [part for part in parts if part["kind"] not in beside] == [
        part for part in without if part["kind"] not in beside
    ]
    own = [*weights(small, OPTIONS, [GPU]), *cache(small, OPTIONS, [GPU]), *compute(small, OPTIONS, [GPU], "cuda")]
    assert of("draft", parts)["gpu0"] == sum(part["bytes"] for part in own if part["where"] == "gpu0")


def test_a_draft_model_can_stay_on_the_processor():
    small = shape(layers=2, width=256)
    options = {**OPTIONS, "n-gpu-layers-draft": 0}
    found = of("draft", predict(shape(), options, [GPU], "cuda", draft=small))
    own = weights(small, {**options, "n-gpu-layers": 0}, [GPU])
    assert found["host"] > sum(part["bytes"] for part in own) == small["weights_bytes"]
    alone = of("draft", predict(shape(), OPTIONS, [], "cpu", draft=small))
    assert alone["host"] > small["weights_bytes"] == 24 * MIB + repacked(small, OPTIONS, [])


def test_options_of_a_draft_model_are_its_own():
    """It takes context, slots and batch from its model, and what has an option of its own from nowhere else."""
    options = {
        **OPTIONS,
        "n-gpu-layers": 10,
        "cache-type-k": "q8_0",
        "n-cpu-moe": 4,
        "embedding": True,
        "spec-draft-type-v": "q4_0",
        "spec-draft-n-ubatch": 128,
    }
    found = draft_options(options)
    assert {name: found.get(name) for name in ("ctx-size", "parallel", "ubatch-size", "cache-type-v")} == {
        "ctx-size": 4096,
        "parallel": 2,
        "ubatch-size": 128,
        "cache-type-v": "q4_0",
    }
    assert not {"n-gpu-layers", "cache-type-k", "n-cpu-moe", "embedding"} & set(found)


def test_a_projector_lies_on_the_first_device_unless_told_otherwise():
    file = {"architecture": "clip", "weights_bytes": 800 * MIB, "hparams": {}}
    two = [GPU, {**GPU, "id": "gpu1"}]
    found = of("projector", predict(shape(), OPTIONS, two, "cuda", projector=file))
    assert found["gpu0"] > 800 * MIB
    assert "gpu1" not in found
    for options, devices in (({**OPTIONS, "mmproj-offload": False}, two), (OPTIONS, [])):
        found = of("projector", predict(shape(), options, devices, "cuda", projector=file))
        assert list(found) == ["host"]
        assert found["host"] > 800 * MIB


def test_a_picture_is_computed_patch_by_patch():
    """Gemma 3's projector: the engine says "CPU compute buffer size = 121.25 MiB"."""
    gemma = {
        "vision.image_size": 896,
        "vision.patch_size": 14,
        "vision.embedding_length": 1152,
        "vision.feed_forward_length": 4304,
        "vision.attention.head_count": 16,
    }
    assert picture_bytes({"hparams": gemma}, {}) == (121.25 * MIB, 4096 * 588 * 4)
    assert picture_bytes({"hparams": gemma}, {"flash-attn": "off"})[0] == 121.25 * MIB + 4096**2 * 16 * 4
    # Small pictures are cut out of larger ones, and where the size is free the limit of tokens counts.
    assert picture_bytes({"hparams": {**gemma, "vision.image_size": 224}}, {})[0] > 121.25 * MIB
    free = {**gemma, "vision.spatial_merge_size": 2}
    whole = picture_bytes({"hparams": free}, {})
    assert whole == tuple(4 * size for size in picture_bytes({"hparams": free}, {"image-max-tokens": 1024}))
    # Qwen2.5-VL: 569.7 MiB on the device and 155.8 on the host, as the server says.
    qwen = {"vision.embedding_length": 1280, "vision.feed_forward_length": 3420, "vision.spatial_merge_size": 2}
    assert [size / MIB for size in picture_bytes({"hparams": qwen}, {})] == pytest.approx([582, 160], abs=0.5)
