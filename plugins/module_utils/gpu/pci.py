# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Graphics cards on the PCI bus, as sysfs shows them: identity, driver, IOMMU group, device nodes."""

from __future__ import annotations

from typing import Any, NamedTuple

from ansible_collections.homelab.inference.plugins.module_utils.gpu.host import Host

DEVICES = "/sys/bus/pci/devices"
NVIDIA, AMD, INTEL = "10de", "1002", "8086"

# Display controllers of every kind, and processing accelerators.
CLASSES = ("0x03", "0x1200")
NAME_FILES = ("/usr/share/misc/pci.ids", "/usr/share/hwdata/pci.ids")


class Card(NamedTuple):
    """One PCI function that may be a GPU."""

    address: str
    vendor: str
    product: str
    subsystem: str | None
    driver: str | None
    iommu_group: int | None

    @property
    def path(self) -> str:
        """Its folder in sysfs."""
        return f"{DEVICES}/{self.address}"

    @property
    def passed_through(self) -> bool:
        """Whether it belongs to a virtual machine, and so not to this host."""
        return self.driver == "vfio-pci"

    def identity(self) -> dict[str, Any]:
        """The optional keys of a device that say which card it is."""
        return {
            "pci_id": f"{self.vendor}:{self.product}",
            "subsystem_id": self.subsystem,
            "iommu_group": self.iommu_group,
        }


def cards(host: Host) -> list[Card]:
    """All graphics cards, by address."""
    return [
        _card(host, address)
        for address in host.names(DEVICES)
        if (host.read(f"{DEVICES}/{address}/class") or "").startswith(CLASSES)
    ]


def _card(host: Host, address: str) -> Card:
    path = f"{DEVICES}/{address}"
    subsystem = [_hexadecimal(host, f"{path}/subsystem_{part}") for part in ("vendor", "device")]
    group = host.target(f"{path}/iommu_group")
    return Card(
        address=address,
        vendor=_hexadecimal(host, f"{path}/vendor") or "",
        product=_hexadecimal(host, f"{path}/device") or "",
        subsystem=":".join(part for part in subsystem if part) or None,
        driver=host.target(f"{path}/driver"),
        iommu_group=int(group) if group and group.isdigit() else None,
    )


def _hexadecimal(host: Host, path: str) -> str | None:
    text = host.read(path)
    return text[2:].lower() if text else None


def render_nodes(host: Host, card: Card) -> list[str]:
    """The card's render nodes, such as /dev/dri/renderD128."""
    return [f"/dev/dri/{name}" for name in host.names(f"{card.path}/drm") if name.startswith("renderD")]


def name(host: Host, card: Card, brand: str) -> str:
    """The card's name in the machine's list of PCI names, else the brand with the card's numbers."""
    for path in NAME_FILES:
        found = find_name(host.read(path) or "", card.vendor, card.product)
        if found:
            return f"{brand} {found}"
    return f"{brand} GPU {card.vendor}:{card.product}"


def find_name(names: str, vendor: str, product: str) -> str | None:
    """A product's name in the text of pci.ids."""
    _before, _vendor, rest = f"\n{names}".partition(f"\n{vendor}  ")
    for line in rest.splitlines()[1:]:
        if line.startswith(f"\t{product}  "):
            return line.strip().partition("  ")[2]
        if line and not line.startswith(("\t", "#")):
            break
    return None
