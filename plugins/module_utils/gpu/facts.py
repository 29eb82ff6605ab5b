# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""All vendors' devices of one machine, numbered so that the numbers stay."""

from __future__ import annotations

from typing import Any

from ansible_collections.homelab.inference.plugins.module_utils.gpu import (
    amd,
    apple,
    emulated,
    intel,
    nvidia,
    pci,
    tegra,
)
from ansible_collections.homelab.inference.plugins.module_utils.gpu.host import Host


def gather(host: Host) -> dict[str, Any]:
    """The facts; a machine without GPUs has three empty ones."""
    cards = pci.cards(host)
    on_chip = tegra.collect(host)
    founds = [nvidia.collect(host, cards), amd.collect(host, cards), intel.collect(host, cards)]
    founds += [on_chip, apple.collect(host), emulated.collect(host)]
    devices = [found for part in founds for found in part.devices]
    if on_chip.devices:
        # nvidia-smi on a Jetson lists the chip's own GPU too, without a memory.
        devices = [found for found in devices if found["vendor"] != "nvidia" or found["memory_kind"] == "dedicated"]
    return {
        "inference_gpus": number(devices),
        "inference_gpu_problems": [problem for found in founds for problem in found.problems],
        "inference_gpu_drivers": {vendor: driver for found in founds for vendor, driver in found.drivers.items()},
    }


def number(devices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give gpu0, gpu1 and so on by PCI address; what is on no bus follows in the order it was found."""
    ordered = sorted(devices, key=lambda found: (found["pci"] is None, found["pci"] or ""))
    return [{"id": f"gpu{index}", **found} for index, found in enumerate(ordered)]
