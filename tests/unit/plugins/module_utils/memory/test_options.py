# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pytest
from ansible_collections.homelab.inference.plugins.module_utils.memory.options import (
    ALL_LAYERS,
    CACHE_TYPES,
    row_bytes,
    settings,
)

SHAPE = {"architecture": "llama", "context_length": 131072, "hparams": {}}


def test_the_server_s_own_defaults():
    found = settings({}, SHAPE)
    assert (found.context, found.slots, found.unified, found.batch, found.ubatch) == (131072, 4, True, 2048, 512)
    assert (found.type_k, found.type_v, found.flash_attention, found.gpu_layers) == ("f16", "f16", True, ALL_LAYERS)
    assert (found.cache_ram_mib, found.checkpoints, found.mmap, found.repack) == (8192, 32, True, True)


@pytest.mark.parametrize(
    ("options", "cells", "streams", "context"),
    [
        ({"ctx-size": 1000, "parallel": 1}, 1024, 1, 1024),
        ({"ctx-size": 1000, "parallel": 3}, 512, 3, 1536),  # 1024 / 3, each rounded up
        ({"ctx-size": 1000, "parallel": 3, "kv-unified": True}, 1024, 1, 1024),
        ({"ctx-size": "8192", "parallel": "4"}, 2048, 4, 8192),
    ],
)
def test_context_comes_in_pieces_of_256_tokens_for_each_slot(options, cells, streams, context):
    found = settings(options, SHAPE)
    assert (found.cells, found.streams, found.context) == (cells, streams, context)


def test_a_batch_is_no_larger_than_the_context_unless_tokens_see_those_after_them():
    small = {"ctx-size": 300, "parallel": 1}
    assert (settings(small, SHAPE).batch, settings(small, SHAPE).ubatch) == (300, 300)
    both_ways = {**SHAPE, "hparams": {"attention.causal": False}}
    assert (settings(small, both_ways).batch, settings(small, both_ways).ubatch) == (2048, 512)


def test_an_embedding_server_takes_a_prompt_in_one_piece():
    found = settings({"ctx-size": 8192, "embeddings": True, "ubatch-size": 4096}, SHAPE)
    assert (found.batch, found.ubatch) == (2048, 2048)
    assert settings({"ctx-size": 8192, "rerank": True}, SHAPE).batch == 512


def test_what_an_owner_may_write_otherwise():
    found = settings(
        {"no-mmap": True, "no-repack": True, "no-kv-offload": True, "gpu-layers": "12", "tensor-split": "3,1"}, SHAPE
    )
    assert (found.mmap, found.repack, found.kv_offload, found.gpu_layers) == (False, False, False, 12)
    assert found.split == (3.0, 1.0)
    assert settings({"load-mode": "none"}, SHAPE).mmap is False
    assert settings({"flash-attn": "off"}, SHAPE).flash_attention is False
    assert settings({"cpu-moe": True}, SHAPE).moe_on_cpu == ALL_LAYERS
    assert settings({"n-gpu-layers": -1}, SHAPE).gpu_layers == ALL_LAYERS


def test_one_architecture_has_no_flash_attention():
    assert settings({}, {**SHAPE, "architecture": "grok"}).flash_attention is False


def test_rows_of_quantised_caches():
    assert {name: row_bytes(name, 128) for name in CACHE_TYPES} == {
        "f32": 512,
        "f16": 256,
        "bf16": 256,
        "q8_0": 136,
        "q5_1": 96,
        "q5_0": 88,
        "q4_1": 80,
        "q4_0": 72,
        "iq4_nl": 72,
    }
