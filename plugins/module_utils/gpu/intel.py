# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Intel cards and integrated graphics, on the kernel drivers i915 and xe."""

from __future__ import annotations

from ansible_collections.homelab.inference.plugins.module_utils.gpu import pci
from ansible_collections.homelab.inference.plugins.module_utils.gpu.device import MIB, Found, device, problem
from ansible_collections.homelab.inference.plugins.module_utils.gpu.host import Host

DRIVERS = ("i915", "xe")

# Where Intel puts the graphics of a processor.
INTEGRATED = "0000:00:02.0"

# The upstream i915 tells no memory size, and the BAR is a power of two or, without resizable BAR, 256 MiB.
# Cards of one size only, in MiB: Arc A310, A380, A580, A750, B570, B580, Pro B50, Pro B60.
KNOWN = {
    "56a6": 4096,
    "56a5": 6144,
    "56a2": 8192,
    "56a1": 8192,
    "e20c": 10240,
    "e20b": 12288,
    "e212": 16384,
    "e211": 24576,
}


def collect(host: Host, cards: list[pci.Card]) -> Found:
    """All Intel devices of this machine."""
    devices, problems, drivers = [], [], {}
    for card in cards:
        if card.vendor != pci.INTEL:
            continue
        unified = card.address == INTEGRATED
        if card.driver is None and not unified:
            evidence = f"{card.address} on the PCI bus has no kernel driver"
            remedy = "Use a kernel whose i915 or xe module knows this card, with its firmware, then reboot."
            problems.append(problem("intel", "tool_missing", evidence, remedy))
        if card.driver not in DRIVERS:
            continue
        drivers["intel"] = {"version": host.read("/proc/sys/kernel/osrelease"), "module": card.driver}
        paths = [path for path in pci.render_nodes(host, card) if host.exists(path)]
        devices.append(
            device(
                "intel",
                pci.name(host, card, "Intel"),
                host.memory_mib() if unified else local_memory_mib(host, card),
                pci=card.address,
                unified=unified,
                driver=card.driver,
                devices=paths,
                groups=host.groups(paths),
                **card.identity(),
            )
        )
    return Found(devices, problems, drivers)


def local_memory_mib(host: Host, card: pci.Card) -> int:
    """A card's own memory: what the driver tells, else what is known of the product, else what the CPU sees of it."""
    folders = [f"{card.path}/{name}" for name in host.names(card.path) if name.startswith("tile")]
    told = [host.number(f"{folder}/physical_vram_size_bytes") or 0 for folder in folders]
    told += [host.number(f"{card.path}/drm/{name}/lmem_total_bytes") or 0 for name in host.names(f"{card.path}/drm")]
    return sum(told) // MIB or KNOWN.get(card.product) or bar_size(host.read(f"{card.path}/resource") or "") // MIB


def bar_size(text: str) -> int:
    """The bytes of BAR 2, the memory window, in sysfs' resource file (start, end and flags a line)."""
    lines = text.splitlines()
    if len(lines) < 3:
        return 0
    start, end = (int(number, 16) for number in lines[2].split()[:2])
    return end - start + 1 if end else 0
