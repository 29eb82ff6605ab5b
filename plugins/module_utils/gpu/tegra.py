# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The GPU inside a Jetson: no card, no memory of its own, and no numbers from nvidia-smi."""

from __future__ import annotations

import re

from ansible_collections.homelab.inference.plugins.module_utils.gpu.device import NOTHING, Found, device
from ansible_collections.homelab.inference.plugins.module_utils.gpu.host import Host

RELEASE = "/etc/nv_tegra_release"
TREE = "/proc/device-tree"

# The compute capability of the GPU in each system on a chip.
ARCHITECTURES = {
    "nvidia,tegra210": "sm_53",
    "nvidia,tegra186": "sm_62",
    "nvidia,tegra194": "sm_72",
    "nvidia,tegra234": "sm_87",
    "nvidia,tegra264": "sm_110",
}

_RELEASE = re.compile(r"^# R(\d+) \(release\), REVISION: ([\d.]+)")


def collect(host: Host) -> Found:
    """The one device of a Jetson."""
    compatible = (host.read(f"{TREE}/compatible") or "").split("\0")
    release = parse_release(host.read(RELEASE) or "")
    if release is None and not any(name.startswith("nvidia,tegra") for name in compatible):
        return NOTHING
    architecture = next((ARCHITECTURES[name] for name in compatible if name in ARCHITECTURES), None)
    name = host.read(f"{TREE}/model") or "NVIDIA Jetson"
    found = device("tegra", name, host.memory_mib(), unified=True, driver=release, architecture=architecture)
    return Found([found], [], {"tegra": {"version": release}} if release else {})


def parse_release(text: str) -> str | None:
    """Jetson Linux' version: R36.4.7."""
    match = _RELEASE.match(text)
    return f"R{match[1]}.{match[2]}" if match else None
