# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""NVIDIA cards, from what nvidia-smi says, and the states in which it says nothing useful."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from ansible_collections.homelab.inference.plugins.module_utils.gpu.command import Answer
from ansible_collections.homelab.inference.plugins.module_utils.gpu.device import NOTHING, Found, device, problem
from ansible_collections.homelab.inference.plugins.module_utils.gpu.host import Host
from ansible_collections.homelab.inference.plugins.module_utils.gpu.pci import NVIDIA, Card

MODULE_VERSION = "/proc/driver/nvidia/version"

# Under WSL there is no card on the PCI bus; this device stands for it.
WSL = "/dev/dxg"
LIBRARIES = [
    f"{folder}/libnvidia-ml.so.1"
    for folder in (
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib/aarch64-linux-gnu",
        "/usr/lib64",
        "/usr/lib",
        "/usr/lib/wsl/lib",
    )
]
REMEDIES = {
    "driver_mismatch": "Reboot, or unload and load the nvidia kernel modules; restart no GPU container before that.",
    "nvml_lost": "In a container: create it anew, with CDI devices or the cgroupfs driver. On a host: reboot it.",
    "hung": "Reboot the machine: nothing else ends a process that waits inside the driver.",
    "tool_missing": "Install the NVIDIA driver with nvidia-smi, or bind the card to vfio-pci for a virtual machine.",
    "lost": "See dmesg why the nvidia kernel module does not serve the card, then reboot; at last reseat the card.",
}

_MODULE_VERSION = re.compile(r"^NVRM version:.*?\s(\d+(?:\.\d+)+)\s", re.MULTILINE)
_LIBRARY_VERSION = re.compile(r"\.so\.(\d+(?:\.\d+)+)$")
_GPU = re.compile(r"^GPU [0-9A-Fa-f]+:[0-9A-Fa-f]+:[0-9A-Fa-f]+\.[0-9A-Fa-f]+\s*$")
_MIG = re.compile(r"^\s+MIG (\S+)\s+Device\s+(\d+): \(UUID: (MIG-[^)]+)\)")
_PROCESS = re.compile(r"^(\d+), (GPU-\S+), (\d+)\s*$", re.MULTILINE)
_CAPABILITY = re.compile(r"^(\d+)\.(\d+)$")


class Log(NamedTuple):
    """What nvidia-smi -q printed: the driver's version, and per GPU its values by path ("PCI/Bus Id")."""

    driver: str | None
    gpus: list[dict[str, str]]


def collect(host: Host, cards: list[Card]) -> Found:
    """All NVIDIA devices of this machine."""
    present = [card for card in cards if card.vendor == NVIDIA and not card.passed_through]
    if not present and not host.exists(MODULE_VERSION) and not host.exists(WSL):
        return NOTHING
    module, library = module_version(host.read(MODULE_VERSION) or ""), _library_version(host)
    drivers = {"nvidia": {"version": module, "library_version": library}}
    problems = []
    if module and library and module != library:
        evidence = f"The loaded kernel module is {module}, the library on disk {library}"
        problems.append(problem("nvidia", "driver_mismatch", evidence, REMEDIES["driver_mismatch"]))

    tool = host.tool("nvidia-smi")
    if tool is None:
        if present:
            evidence = f"{_addresses(present)} on the PCI bus, driver {present[0].driver}, but no nvidia-smi"
            problems.append(problem("nvidia", "tool_missing", evidence, REMEDIES["tool_missing"]))
        return Found([], problems, drivers)

    answer = host.run([tool, "-q"])
    state = failure(answer)
    if state:
        if state not in [known["state"] for known in problems]:
            evidence = answer.hung or answer.output.strip().replace("\n", " ")
            problems.append(problem("nvidia", state, evidence, REMEDIES[state]))
        return Found([], problems, drivers)

    log = parse_log(answer.output)
    drivers["nvidia"]["version"] = module or log.driver
    capabilities = parse_capabilities(host.run([tool, "--query-gpu=compute_cap", "--format=csv,noheader"]).output)
    instances = {}
    if any(gpu.get("MIG Mode/Current") == "Enabled" for gpu in log.gpus):
        instances = parse_instances(host.run([tool, "-L"]).output)
    groups = {card.address: card.iommu_group for card in present}
    devices = []
    for index, gpu in enumerate(log.gpus):
        capability = capabilities[index] if len(capabilities) == len(log.gpus) else None
        found = describe(gpu, log.driver, capability, instances.get(index, []), host.memory_mib())
        found.update({"iommu_group": groups[found["pci"]]} if groups.get(found["pci"]) is not None else {})
        devices.append(found)
    gone = [card for card in present if card.address not in [found["pci"] for found in devices]]
    if gone:
        lines = [line for line in answer.output.splitlines() if "device handle" in line or "No devices" in line]
        evidence = f"{_addresses(gone)} on the PCI bus, but not in the answer of nvidia-smi. {' '.join(lines)}".strip()
        problems.append(problem("nvidia", "lost", evidence, REMEDIES["lost"]))
    return Found(devices, problems, drivers)


def processes(host: Host) -> dict[tuple[int, str], int]:
    """Return the MiB that each process takes of each card, by its ID and the card's UUID; nothing where it is not said.

    In MIG mode and under WSL nvidia-smi says V([N/A]).
    """
    tool = host.tool("nvidia-smi")
    if tool is None:
        return {}
    asked = "--query-compute-apps=pid,gpu_uuid,used_gpu_memory"
    return parse_processes(host.run([tool, asked, "--format=csv,noheader,nounits"]).output)


def parse_processes(text: str) -> dict[tuple[int, str], int]:
    """Read the answer of nvidia-smi to the question of P(processes)."""
    return {(int(pid), uuid): int(size) for pid, uuid, size in _PROCESS.findall(text)}


def failure(answer: Answer) -> str | None:
    """The state that an answer without any GPU in it stands for."""
    if answer.hung:
        return "hung"
    if "Driver/library version mismatch" in answer.output:
        return "driver_mismatch"
    if "couldn't communicate with the NVIDIA driver" in answer.output or "Driver Not Loaded" in answer.output:
        return "lost"
    if "Failed to initialize NVML" in answer.output:
        return "nvml_lost"
    return None


def parse_log(text: str) -> Log:
    """Read nvidia-smi -q: indented sections, one block per GPU."""
    driver = None
    gpus: list[dict[str, str]] = []
    sections: list[tuple[int, str]] = []
    instance = 0
    for line in text.splitlines():
        if _GPU.match(line):
            gpus.append({})
            sections, instance = [], 0
            continue
        indent = len(line) - len(line.lstrip())
        key, colon, value = (part.strip() for part in line.partition(":"))
        if not indent:
            driver = value if key == "Driver Version" else driver
            continue
        while sections and sections[-1][0] >= indent:
            sections.pop()
        if not colon:
            if key == "MIG Device":
                key, instance = f"MIG Device {instance}", instance + 1
            sections.append((indent, key))
        elif gpus:
            gpus[-1]["/".join([*(name for _indent, name in sections), key])] = value
    return Log(driver, gpus)


def parse_capabilities(text: str) -> list[str]:
    """Read --query-gpu=compute_cap: one line per GPU, nothing usable from drivers that do not know the field."""
    matches = [_CAPABILITY.match(line.strip()) for line in text.splitlines() if line.strip()]
    return [f"sm_{match[1]}{match[2]}" for match in matches if match]


def parse_instances(text: str) -> dict[int, list[dict[str, Any]]]:
    """Read nvidia-smi -L: the MIG instances by the GPU's place in the list, in the order of their device numbers."""
    instances: dict[int, list[dict[str, Any]]] = {}
    gpu = -1
    for line in text.splitlines():
        match = _MIG.match(line)
        if match:
            instances.setdefault(gpu, []).append({"uuid": match[3], "profile": match[1]})
        elif line.startswith("GPU "):
            gpu += 1
    return instances


def describe(
    gpu: dict[str, str],
    driver: str | None,
    capability: str | None,
    instances: list[dict[str, Any]],
    machine_mib: int,
) -> dict[str, Any]:
    """One GPU block of the log as a device. A GPU that reports no memory of its own shares the machine's."""
    memory = _mib(gpu.get("FB Memory Usage/Total"))
    for index, instance in enumerate(instances):
        part = f"MIG Device {index}"
        instance["memory_mib"] = _mib(
            gpu.get(f"{part}/Shared FB Memory Usage/Total", gpu.get(f"{part}/FB Memory Usage/Total"))
        )
    return device(
        "nvidia",
        gpu.get("Product Name", "NVIDIA GPU"),
        machine_mib if memory is None else memory,
        uuid=gpu.get("GPU UUID"),
        pci=_address(gpu.get("PCI/Bus Id")),
        unified=memory is None,
        driver=driver,
        architecture=capability,
        used_mib=_mib(gpu.get("FB Memory Usage/Used")),
        pci_id=_pci_id(gpu.get("PCI/Device Id")),
        subsystem_id=_pci_id(gpu.get("PCI/Sub System Id")),
        mig=instances,
    )


def module_version(text: str) -> str | None:
    """The version of the loaded kernel module, from /proc/driver/nvidia/version."""
    match = _MODULE_VERSION.search(f"{text}\n")
    return match[1] if match else None


def _library_version(host: Host) -> str | None:
    for path in LIBRARIES:
        match = _LIBRARY_VERSION.search(host.target(path) or "")
        if match:
            return match[1]
    return None


def _addresses(cards: list[Card]) -> str:
    return ", ".join(card.address for card in cards)


def _mib(text: str | None) -> int | None:
    number, _blank, unit = (text or "").partition(" ")
    return int(number) if unit == "MiB" and number.isdigit() else None


def _address(text: str | None) -> str | None:
    # nvidia-smi writes the PCI domain with eight digits, the kernel with at least four.
    domain, colon, rest = (text or "").lower().partition(":")
    return f"{int(domain, 16):04x}:{rest}" if colon else None


def _pci_id(text: str | None) -> str | None:
    digits = (text or "").lower().partition("0x")[2]
    return f"{digits[4:]}:{digits[:4]}" if len(digits) == 8 else None
