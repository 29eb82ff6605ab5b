# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Machines made of recorded files and answers."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ansible_collections.homelab.inference.plugins.module_utils.gpu.command import Answer
from ansible_collections.homelab.inference.plugins.module_utils.gpu.host import Host
from ansible_collections.homelab.inference.plugins.module_utils.gpu.nvidia import parse_log

FIXTURES = Path(__file__).resolve().parents[3] / "fixtures" / "gpu"

_LSPCI = re.compile(r"^(\S+) .*?\[(\w{4})\]: .*\[(\w{4}):(\w{4})\]")
_SUBSYSTEM = re.compile(r"^\s+Subsystem: .*\[(\w{4}):(\w{4})\]", re.MULTILINE)
_LISTED = re.compile(r"^GPU \d+: (.+) \(UUID: (\S+)\)", re.MULTILINE)
_TABLE_ROW = re.compile(r"^\|.+\| (\w{8}:\S+) .*\n\|.+\| +(\d+)MiB / (\d+)MiB ", re.MULTILINE)


def recorded(name: str) -> str:
    """A fixture's text."""
    return (FIXTURES / name).read_text(encoding="utf-8")


def two_quadros() -> str:
    """The recorded machine with two Quadros as nvidia-smi -q would log it, the last card first."""
    table = recorded("nvidia_two_quadros_table.txt")
    listed = _LISTED.findall(recorded("nvidia_two_quadros_list.txt"))
    card = recorded("nvidia_quadro_rtx_5000_pci.txt").splitlines()
    identity = [line for line in card if line.startswith(("        Device Id", "        Sub System Id"))]
    driver = re.search(r"Driver Version: (\S+)", table)[1]
    log = [f"Driver Version : {driver}"]
    for (name, uuid), (address, used, total) in reversed(list(zip(listed, _TABLE_ROW.findall(table)))):
        log += [f"GPU {address}", f"    Product Name : {name}", f"    GPU UUID : {uuid}", "    PCI", *identity]
        log += [f"        Bus Id : {address}", "    FB Memory Usage"]
        log += [f"        Total : {total} MiB", f"        Used : {used} MiB"]
    return "\n".join(log) + "\n"


class Machine:
    """A tree of files, and what its commands print, by their arguments."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.answers: dict[tuple[str, ...], Answer] = {}
        self.listening: set[str] = set()

    def host(self, system: str = "Linux") -> Host:
        """The machine as the collectors see it."""

        def run(argv: list[str], _deadline: float) -> Answer:
            return self.answers.get(tuple(argv[1:]), Answer(1, "no such option\n"))

        def connect(endpoint: str) -> str | None:
            return None if endpoint in self.listening else "[Errno 111] Connection refused"

        return Host(self.root, system=system, runner=run, connector=connect)

    def file(self, path: str, text: str = "") -> None:
        """Write a file."""
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")

    def link(self, path: str, target: str) -> None:
        """Make a link to a path of this machine."""
        link = self.root / path.lstrip("/")
        link.parent.mkdir(parents=True, exist_ok=True)
        (self.root / target.lstrip("/")).mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(self.root / target.lstrip("/"), link.parent))

    def card(
        self,
        address: str,
        ids: str,
        *,
        subsystem: str = "",
        driver: str | None = None,
        group: int | None = None,
        kind: str = "0x030000",
    ) -> str:
        """Put a card on the PCI bus; its folder."""
        folder = f"/sys/bus/pci/devices/{address}"
        vendor, product = ids.split(":")
        self.file(f"{folder}/class", f"{kind}\n")
        self.file(f"{folder}/vendor", f"0x{vendor}\n")
        self.file(f"{folder}/device", f"0x{product}\n")
        if subsystem:
            maker, model = subsystem.split(":")
            self.file(f"{folder}/subsystem_vendor", f"0x{maker}\n")
            self.file(f"{folder}/subsystem_device", f"0x{model}\n")
        if driver:
            self.link(f"{folder}/driver", f"/sys/bus/pci/drivers/{driver}")
        if group is not None:
            self.link(f"{folder}/iommu_group", f"/sys/kernel/iommu_groups/{group}")
        return folder

    def card_of_lspci(self, text: str, driver: str) -> str:
        """Put the card of an lspci -nn listing on the bus; its folder."""
        address, kind, vendor, product = _LSPCI.match(text).groups()
        subsystem = _SUBSYSTEM.search(text)
        return self.card(
            f"0000:{address}",
            f"{vendor}:{product}",
            subsystem=":".join(subsystem.groups()) if subsystem else "",
            driver=driver,
            kind=f"0x{kind}00",
        )

    def render_node(self, folder: str, name: str = "renderD128") -> None:
        """Give a card its render node."""
        self.file(f"{folder}/drm/{name}/dev", "226:128\n")
        self.file(f"{folder}/drm/card1/dev", "226:1\n")
        self.file(f"/dev/dri/{name}")

    def nvidia(self, log: str) -> None:
        """Install nvidia-smi with this log, and put the log's own cards on the bus."""
        self.tool("nvidia-smi")
        self.answers[("-q",)] = Answer(0, log)
        for index, gpu in enumerate(parse_log(log).gpus):
            ids, maker = gpu["PCI/Device Id"].lower(), gpu["PCI/Sub System Id"].lower()
            self.card(
                gpu["PCI/Bus Id"].lower()[4:],
                f"{ids[6:]}:{ids[2:6]}",
                subsystem=f"{maker[6:]}:{maker[2:6]}",
                driver="nvidia",
                group=30 + index,
            )

    def tool(self, name: str) -> None:
        """Install a program that never runs: the answers come from the recordings."""
        self.file(f"/usr/bin/{name}", "#!/bin/false\n")
        (self.root / "usr/bin" / name).chmod(0o755)
