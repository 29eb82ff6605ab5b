# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pytest
from ansible_collections.homelab.inference.plugins.module_utils.memory.layers import layer_devices

ONE = [{"id": "gpu0", "memory_mib": 8192}]
TWO = [{"id": "gpu0", "memory_mib": 8192}, {"id": "gpu1", "memory_mib": 24576}]


def where(layers, options, devices):
    found = layer_devices({"block_count": layers, "context_length": 4096}, options, devices)
    return " ".join(f"{name}*{found.count(name)}" for name in sorted(set(found), key=found.index))


@pytest.mark.parametrize(
    ("options", "devices", "expected"),
    [
        ({}, [], "host*33"),
        ({"n-gpu-layers": 0}, ONE, "host*33"),
        ({"n-gpu-layers": 1}, ONE, "host*32 gpu0*1"),  # the output layer alone
        ({"n-gpu-layers": 32}, ONE, "host*1 gpu0*32"),
        ({"n-gpu-layers": "all"}, ONE, "gpu0*33"),
        ({"n-gpu-layers": 99}, ONE, "gpu0*33"),
        ({}, TWO, "gpu0*9 gpu1*24"),  # by their memory, 1 : 3
        ({"tensor-split": [1, 1]}, TWO, "gpu0*17 gpu1*16"),
        ({"tensor-split": [0, 1]}, TWO, "gpu1*33"),
        ({"tensor-split": [1]}, TWO, "gpu0*33"),
        ({"tensor-split": [1, 1], "n-gpu-layers": 11}, TWO, "host*22 gpu0*6 gpu1*5"),
        ({"split-mode": "none", "main-gpu": 1}, TWO, "gpu1*33"),
    ],
)
def test_layers_go_to_devices(options, devices, expected):
    assert where(32, options, devices) == expected


def test_a_boundary_is_decided_in_single_precision():
    """In doubles, 7 of 10 layers are not below 0.1 + 0.6 of the cards; the eighth would go to the third one."""
    three = [*TWO, {"id": "gpu2", "memory_mib": 1}]
    assert where(9, {"tensor-split": [0.1, 0.6, 0.3]}, three) == "gpu0*1 gpu1*7 gpu2*2"


def test_cards_of_unknown_size_share_alike():
    assert where(3, {}, [{"id": "gpu0", "memory_mib": 0}, {"id": "gpu1", "memory_mib": 0}]) == "gpu0*2 gpu1*2"


def test_blocks_that_are_gone_through_twice_are_layers_each_time():
    shape = {"architecture": "nanbeige", "block_count": 4, "context_length": 4096, "hparams": {"num_loops": 2}}
    assert layer_devices(shape, {"n-gpu-layers": 5}, ONE) == ["host"] * 4 + ["gpu0"] * 5
    assert len(layer_devices({**shape, "hparams": {"num_loops": 1 << 40}}, {}, ONE)) == 513
