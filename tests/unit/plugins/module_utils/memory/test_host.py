# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a server takes besides weights, caches and buffers."""

from __future__ import annotations

import pytest
from ansible_collections.homelab.inference.plugins.module_utils.memory.host import (
    DEVICE_OVERHEAD_MIB,
    host,
    with_device_process,
    with_read_ahead,
    with_uploads,
)

MIB = 2**20
GPU = {"id": "gpu0", "vendor": "nvidia", "memory_mib": 24576, "cap_mib": None}
OPTIONS = {"ctx-size": 4096, "parallel": 2, "cache-ram": 0, "ctx-checkpoints": 2, "n-gpu-layers": "all"}


def shape(**more):
    """A model of two layers, 20 MiB each, of which a processor may keep 16 MiB in another order."""
    return {
        "architecture": "llama",
        "context_length": 8192,
        "block_count": 2,
        "embedding_length": 1024,
        "head_count": 16,
        "head_count_kv": 16,
        "key_length": 64,
        "value_length": 64,
        "expert_count": 0,
        "expert_used_count": 0,
        "tokenizer": "llama",
        "vocab_size": 32768,
        "tied_output": False,
        "input_bytes": 8 * MIB,
        "embedding_bytes": 8 * MIB,
        "output_bytes": 8 * MIB,
        "other_bytes": 0,
        "block_bytes": [20 * MIB] * 2,
        "expert_bytes": [0, 0],
        "ffn_bytes": [10 * MIB] * 2,
        "repack_bytes": {"Q4_0": {"blocks": [16 * MIB] * 2}, "Q8_0": {"output": 8 * MIB}},
        "hparams": {"feed_forward_length": 4096},
        **more,
    }


def sizes(*args, **keywords):
    """MiB by place and kind."""
    return {(part["where"], part["kind"]): part["bytes"] / MIB for part in host(*args, **keywords)}


def test_on_a_processor_alone_nothing_is_taken_of_a_device():
    found = sizes(shape(), OPTIONS, [], "cpu")
    assert {where for where, _kind in found} == {"host"}
    assert found["host", "repack"] == 32


def test_types_that_this_kind_of_processor_reorders_are_there_twice():
    """x86 with AVX2 leaves Q8_0 as it is, Arm does not (measured and read: ggml-cpu/repack.cpp)."""
    orin = {"id": "gpu0", "vendor": "tegra", "memory_mib": 8192, "cap_mib": None}
    assert sizes(shape(), OPTIONS, [], "cpu")["host", "repack"] == 32
    assert ("host", "repack") not in sizes(shape(), {**OPTIONS, "repack": False}, [], "cpu")
    # Beside a device with pinned memory of its own, weights stay as they are in the file.
    assert ("host", "repack") not in sizes(shape(), {**OPTIONS, "n-gpu-layers": 0}, [orin], "cuda")


def test_what_was_seen_of_a_device_is_believed_more_than_the_table():
    assert sizes(shape(), OPTIONS, [GPU], "cuda")["gpu0", "overhead"] == DEVICE_OVERHEAD_MIB["cuda"]
    assert sizes(shape(), OPTIONS, [GPU], "cuda", overheads={"cuda": 500})["gpu0", "overhead"] == 500
    learned = host(shape(), OPTIONS, [GPU], "cuda", overheads={"cuda": 500, "gpu0": 610})
    assert [(part["bytes"] / MIB, part["source"]) for part in learned if part["kind"] == "overhead"] == [
        (610, "measured")
    ]


def test_each_device_is_opened_once():
    found = sizes(shape(), OPTIONS, [GPU, {**GPU, "id": "gpu1"}], "vulkan")
    assert found["gpu0", "overhead"] == found["gpu1", "overhead"] == DEVICE_OVERHEAD_MIB["vulkan"]


def test_an_unknown_backend_is_counted_like_the_dearest():
    assert sizes(shape(), OPTIONS, [GPU], "new")["gpu0", "overhead"] == max(DEVICE_OVERHEAD_MIB.values())


def test_a_model_without_windows_and_states_needs_no_checkpoints():
    assert ("host", "prompt_cache") not in sizes(shape(), OPTIONS, [], "cpu")


def test_checkpoints_hold_what_cannot_be_rolled_back():
    gemma = shape(architecture="gemma3", block_count=6, block_bytes=[20 * MIB] * 6, expert_bytes=[0] * 6)
    gemma["hparams"] = {"feed_forward_length": 4096, "attention.sliding_window": 512}
    # Five of six layers, the 512 tokens of the window, keys and values of 1024 halves each; two slots, two checkpoints.
    one = 5 * 512 * 2 * 1024 * 2 / MIB
    assert sizes(gemma, OPTIONS, [], "cpu")["host", "prompt_cache"] == 2 * 2 * one
    assert sizes(gemma, {**OPTIONS, "kv-unified": True}, [], "cpu")["host", "prompt_cache"] == 2 * 2 * one
    assert ("host", "prompt_cache") not in sizes(gemma, {**OPTIONS, "swa-full": True}, [], "cpu")
    assert ("host", "prompt_cache") not in sizes(gemma, {**OPTIONS, "ctx-checkpoints": 0}, [], "cpu")


@pytest.mark.parametrize(("given", "limit"), [({"cache-ram": 512}, 512), ({}, 8192)])
def test_the_prompt_cache_passes_its_limit_by_one_prompt(given, limit):
    options = {name: value for name, value in OPTIONS.items() if name != "cache-ram"}
    one = 2 * 2048 * 2 * 1024 * 2 / MIB
    assert sizes(shape(), {**options, **given}, [], "cpu")["host", "prompt_cache"] == limit + one


def test_a_vocabulary_of_byte_pairs_has_merges_too():
    base = sizes(shape(vocab_size=0), OPTIONS, [], "cpu")["host", "base"]
    pieces = sizes(shape(vocab_size=250000), OPTIONS, [], "cpu")["host", "base"] - base
    pairs = sizes(shape(vocab_size=152000, tokenizer="gpt2"), OPTIONS, [], "cpu")["host", "base"] - base
    # Measured: 256000 pieces took 42 MiB; 152000 tokens with as many merges 43 MiB, Llama 3's have twice as many.
    assert 40 < pieces < 44
    assert 43 < pairs < 66


def base(**more):
    parts = host(shape(**more), {**OPTIONS, "ubatch-size": 512}, [], "cpu")
    return next(part["bytes"] for part in parts if part["kind"] == "base")


def test_tables_of_large_graphs_are_counted():
    # A delta net's graph grows with the batch: 20480 nodes at 512 tokens, 22 MiB as measured.
    assert base(architecture="qwen3next") - base() == pytest.approx(21.5 * MIB, abs=1.5 * MIB)
    assert base(tensor_count=300) - base(tensor_count=100) == 1100 * (2400 - 1024)


def test_a_tensor_on_its_way_to_another_process_is_held_once_more():
    parts = [
        {"where": "host", "kind": "base", "bytes": MIB, "source": "bound"},
        {"where": "host", "kind": "compute", "bytes": 3 * MIB, "source": "computed"},
    ]
    assert with_uploads(parts, shape(), "emulated")[0]["bytes"] == 6 * MIB  # the output, 8 MiB
    assert with_uploads(parts, shape(), "cuda") == parts


def test_a_tensor_that_arrives_counts_where_it_is_more_than_what_comes_later():
    cards = [{"id": f"gpu{number}", "vendor": "emulated", "memory_mib": 1024} for number in range(2)]
    parts = [{"where": card["id"], "kind": "overhead", "bytes": 18 * MIB, "source": "bound"} for card in cards]
    for kind, size in (("weights", 9), ("kv", 1), ("compute", 1)):
        parts += [{"where": card["id"], "kind": kind, "bytes": size * MIB, "source": "computed"} for card in cards]
    both = {**OPTIONS, "n-gpu-layers": "all", "tensor-split": [1, 2]}

    def taken(given, backend="emulated", **more):
        found = with_device_process(parts, shape(**more), {**both, **given}, cards, backend)
        return [
            [part["bytes"] / MIB // 0.5 * 0.5 for part in found if (part["kind"], part["where"]) == (kind, card["id"])]
            for kind in ("overhead", "staging")
            for card in cards
        ]

    # Half a MiB to work in; and a third of 10 MiB of feed-forward once more, of which 2 MiB are there for caches later.
    assert taken({}) == [[18.5], [18.5], [1.0], [5.0]]
    # The output comes first: twice 8 MiB, where all weights are 9.
    assert taken({}, expert_bytes=[30 * MIB] * 2) == [[18.5], [18.5], [18.0], [18.0]]
    assert taken({"n-cpu-moe": 1}, expert_bytes=[30 * MIB] * 2) == [[18.5], [18.5], [1.0], [18.0]]
    assert taken({}, output_bytes=7 * MIB) == [[18.5], [18.5], [1.0], [3.0]]
    assert taken({}, output_bytes=MIB, tied_output=True) == [[18.5], [18.5], [1.0], [5.0]]
    assert taken({}, "cuda") == [[18.0], [18.0], [], []]


def test_reordered_weights_leave_room_to_read_ahead():
    parts = [{"where": "host", "kind": kind, "bytes": 100 * MIB, "source": "bound"} for kind in ("base", "repack")]
    assert with_read_ahead(parts)[0]["bytes"] == 104 * MIB
    assert with_read_ahead(parts[:1]) == parts[:1]
