# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""AMD cards and APUs, from sysfs alone: no ROCm is needed on the node."""

from __future__ import annotations

from ansible_collections.homelab.inference.plugins.module_utils.gpu import pci
from ansible_collections.homelab.inference.plugins.module_utils.gpu.device import MIB, Found, device, problem
from ansible_collections.homelab.inference.plugins.module_utils.gpu.host import Host

NODES = "/sys/class/kfd/kfd/topology/nodes"
KFD = "/dev/kfd"

# The targets that LLVM's AMDGPU guide lists as APUs: their memory is the machine's.
APUS = (
    *("gfx902", "gfx909", "gfx90c", "gfx1013", "gfx1033", "gfx1035", "gfx1036", "gfx1037", "gfx1103"),
    *("gfx1150", "gfx1151", "gfx1152", "gfx1153"),
)


def collect(host: Host, cards: list[pci.Card]) -> Found:
    """All AMD devices of this machine."""
    devices, problems, drivers = [], [], {}
    nodes = kfd_nodes(host)
    for card in cards:
        if card.vendor != pci.AMD:
            continue
        if card.driver is None:
            evidence = f"{card.address} on the PCI bus has no kernel driver"
            remedy = "Install the kernel's amdgpu module (linux-modules-extra on Ubuntu) and its firmware, then reboot."
            problems.append(problem("amd", "tool_missing", evidence, remedy))
        if card.driver != "amdgpu":
            continue
        drivers["amd"] = {"version": host.read("/sys/module/amdgpu/version") or host.read("/proc/sys/kernel/osrelease")}
        vram = host.number(f"{card.path}/mem_info_vram_total")
        gtt = host.number(f"{card.path}/mem_info_gtt_total") or 0
        if vram is None:
            evidence = f"amdgpu holds {card.address}, but tells no memory sizes"
            problems.append(problem("amd", "lost", evidence, "See why amdgpu gave up in dmesg, then reboot."))
            continue
        target = gfx_target(nodes.get(card.address, {}).get("gfx_target_version", 0))
        unified = target in APUS
        used = host.number(f"{card.path}/mem_info_vram_used")
        paths = [path for path in [KFD, *pci.render_nodes(host, card)] if host.exists(path)]
        devices.append(
            device(
                "amd",
                host.read(f"{card.path}/product_name") or pci.name(host, card, "AMD"),
                (vram + gtt if unified else vram) // MIB,
                uuid=unique_id(host.read(f"{card.path}/unique_id")),
                pci=card.address,
                unified=unified,
                # ROCm takes one of the two heaps, Vulkan both: only the larger one is good for either.
                cap_mib=max(vram, gtt) // MIB if unified else None,
                driver=card.driver,
                architecture=target,
                # The GTT's counter misses what HIP allocates, so an APU's use is not known.
                used_mib=None if unified or used is None else used // MIB,
                devices=paths,
                groups=host.groups(paths),
                **card.identity(),
            )
        )
    return Found(devices, problems, drivers)


def kfd_nodes(host: Host) -> dict[str, dict[str, int]]:
    """The GPUs that the kernel's compute driver knows, by PCI address."""
    nodes = (parse_properties(host.read(f"{NODES}/{name}/properties") or "") for name in host.names(NODES))
    return {address(node): node for node in nodes if node.get("gfx_target_version")}


def parse_properties(text: str) -> dict[str, int]:
    """Read a topology node: one name and one number a line."""
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def address(node: dict[str, int]) -> str:
    """A topology node's PCI address: location_id is bus, device and function in 8, 5 and 3 bits."""
    location = node.get("location_id", 0)
    return f"{node.get('domain', 0):04x}:{location >> 8 & 0xFF:02x}:{location >> 3 & 0x1F:02x}.{location & 7}"


def gfx_target(version: int) -> str | None:
    """120001 -> gfx1201, 90010 -> gfx90a."""
    return f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}" if version else None


def unique_id(text: str | None) -> str | None:
    """The identifier that ROCm selects a card by; an APU has none (zeros or ones)."""
    return None if not text or set(text) <= {"0"} or set(text) <= {"f"} else f"GPU-{text}"
