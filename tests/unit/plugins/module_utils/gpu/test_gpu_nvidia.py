# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""NVIDIA cards and the states of their driver."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.homelab.inference.plugins.module_utils.gpu import nvidia
from ansible_collections.homelab.inference.plugins.module_utils.gpu.command import Answer
from ansible_collections.homelab.inference.plugins.module_utils.gpu.facts import gather
from ansible_collections.homelab.inference.tests.unit.plugins.module_utils.gpu.gpu_machine import (
    Machine,
    recorded,
    two_quadros,
)

CAPABILITY = ("--query-gpu=compute_cap", "--format=csv,noheader")

CARDS = {
    "nvidia_rtx_2080_super.txt": {
        "name": "NVIDIA GeForce RTX 2080 SUPER",
        "uuid": "GPU-00000000-0000-0000-0000-000000000000",
        "pci": "0000:0c:00.0",
        "memory_mib": 8192,
        "driver": "595.71.05",
        "used_mib": 819,
        "pci_id": "10de:1e81",
        "subsystem_id": "1458:4005",
    },
    "nvidia_rtx_3090.txt": {
        "name": "NVIDIA GeForce RTX 3090",
        "uuid": "GPU-4aba3cfa-7b42-cca6-97f4-5cdd281b0746",
        "pci": "0000:41:00.0",
        "memory_mib": 24576,
        "driver": "560.35.03",
        "used_mib": 2,
        "pci_id": "10de:2204",
        "subsystem_id": "1458:403b",
    },
    "nvidia_rtx_3090_ti.txt": {
        "name": "NVIDIA GeForce RTX 3090 Ti",
        "uuid": "GPU-b54a952b-c1a3-5e2f-2e2e-0c99355a7454",
        "pci": "0000:05:00.0",
        "memory_mib": 24564,
        "driver": "580.142",
        "used_mib": 22700,
        "pci_id": "10de:2203",
        "subsystem_id": "1462:5091",
    },
    "nvidia_rtx_4090.txt": {
        "name": "NVIDIA GeForce RTX 4090",
        "uuid": "GPU-8ee5f1e0-e705-aac5-6d6e-b97ad59601ef",
        "pci": "0000:01:00.0",
        "memory_mib": 24564,
        "driver": "550.127.05",
        "used_mib": 2,
        "pci_id": "10de:2684",
        "subsystem_id": "10b0:f297",
    },
    "nvidia_rtx_5090.txt": {
        "name": "NVIDIA GeForce RTX 5090",
        "uuid": "GPU-ea2294a3-4d61-1757-8aed-f91723f16ad2",
        "pci": "0000:02:00.0",
        "memory_mib": 32607,
        "driver": "570.124.06",
        "used_mib": 2,
        "pci_id": "10de:2b85",
        "subsystem_id": "1569:f318",
    },
}


@pytest.mark.parametrize("fixture", CARDS)
def test_card(machine: Machine, fixture: str) -> None:
    """Each card of the labs comes out whole, and nothing is wrong with it."""
    machine.nvidia(recorded(fixture))
    facts = gather(machine.host())
    expected: dict[str, Any] = {
        "id": "gpu0",
        "vendor": "nvidia",
        "memory_kind": "dedicated",
        "cap_mib": None,
        "iommu_group": 30,
        **CARDS[fixture],
    }
    assert facts["inference_gpus"][0] == expected
    assert facts["inference_gpu_problems"] == []
    assert facts["inference_gpu_drivers"] == {"nvidia": {"version": expected["driver"], "library_version": None}}


def test_two_cards_of_one_kind(machine: Machine) -> None:
    """Two equal cards differ by UUID and address."""
    machine.nvidia(recorded("nvidia_rtx_3090.txt"))
    devices = gather(machine.host())["inference_gpus"]
    assert [(found["id"], found["pci"], found["uuid"][:12]) for found in devices] == [
        ("gpu0", "0000:41:00.0", "GPU-4aba3cfa"),
        ("gpu1", "0000:81:00.0", "GPU-74e6e433"),
    ]


def test_quadro_of_an_old_driver() -> None:
    """The two recorded parts of a machine with Quadros give name, UUID and PCI identity."""
    (head,) = nvidia.parse_log(recorded("nvidia_quadro_rtx_5000.txt")).gpus
    assert (head["Product Name"], head["GPU UUID"]) == ("Quadro RTX 5000", "GPU-6cbfc392-4354-9382-e63d-d6bbbcf74a6a")
    log = nvidia.parse_log("GPU 00000000:82:00.0\n" + recorded("nvidia_quadro_rtx_5000_pci.txt"))
    found = nvidia.describe(log.gpus[0], None, None, [], 0)
    assert (found["pci"], found["pci_id"], found["subsystem_id"]) == ("0000:82:00.0", "10de:1eb0", "10de:129f")


def test_two_quadros(machine: Machine) -> None:
    """The cards of a lab come out whole, numbered by address even where nvidia-smi lists them in another order."""
    machine.nvidia(two_quadros())
    machine.answers[CAPABILITY] = Answer(0, "7.5\n7.5\n")
    facts = gather(machine.host())
    common = {
        "vendor": "nvidia",
        "name": "Quadro RTX 5000",
        "memory_kind": "dedicated",
        "cap_mib": None,
        "driver": "418.87.00",
        "architecture": "sm_75",
        "pci_id": "10de:1eb0",
        "subsystem_id": "10de:129f",
    }
    assert facts["inference_gpus"] == [
        {
            "id": "gpu0",
            "uuid": "GPU-1f923d52-ea64-f463-96a4-3bece2719a8b",
            "pci": "0000:67:00.0",
            "memory_mib": 16095,
            "used_mib": 15871,
            "iommu_group": 31,
            **common,
        },
        {
            "id": "gpu1",
            "uuid": "GPU-20947179-1907-5468-1325-a3fc16f5a54e",
            "pci": "0000:68:00.0",
            "memory_mib": 16092,
            "used_mib": 15869,
            "iommu_group": 30,
            **common,
        },
    ]
    assert facts["inference_gpu_problems"] == []


def test_driver_that_does_not_know_compute_cap(machine: Machine) -> None:
    """An old driver answers the second question with an error; the card is there all the same."""
    machine.nvidia(recorded("nvidia_rtx_3090_ti.txt"))
    machine.answers[CAPABILITY] = Answer(2, 'Field "compute_cap" is not a valid field to query.\n')
    (found,) = gather(machine.host())["inference_gpus"]
    assert "architecture" not in found


def test_mig(machine: Machine) -> None:
    """MIG instances: identity from the list, memory from the log."""
    machine.nvidia(recorded("nvidia_h100_mig.txt"))
    machine.answers[("-L",)] = Answer(0, recorded("synthetic_nvidia_mig_list.txt"))
    (found,) = gather(machine.host())["inference_gpus"]
    assert found["memory_mib"] == 81559
    assert [(part["profile"], part["memory_mib"]) for part in found["mig"]] == [
        ("3g.40gb", 40448),
        ("2g.20gb", 20096),
        ("1g.10gb", 9984),
        ("1g.10gb", 9984),
    ]
    assert found["mig"][0]["uuid"] == "MIG-dcf43e8e-5d19-5fa8-8b1d-8aaca1e467f0"


def _problem(machine: Machine) -> dict[str, str]:
    facts = gather(machine.host())
    (found,) = facts["inference_gpu_problems"]
    assert found["vendor"] == "nvidia"
    assert found["remedy"]
    return found


@pytest.mark.parametrize(
    ("answer", "state", "evidence"),
    [
        (Answer(18, recorded("nvidia_mismatch.txt")), "driver_mismatch", "NVML library version: 570.124"),
        (Answer(255, recorded("nvidia_nvml_unknown_error.txt")), "nvml_lost", "Unknown Error"),
        (Answer(9, recorded("synthetic_nvidia_no_driver.txt")), "lost", "couldn't communicate"),
        (Answer(6, "No devices were found\n"), "lost", "0000:05:00.0 on the PCI bus"),
        (Answer(-9, "", "nvidia-smi gave no answer in 20 s"), "hung", "no answer in 20 s"),
    ],
)
def test_states(machine: Machine, answer: Answer, state: str, evidence: str) -> None:
    """What nvidia-smi says instead of cards is a state, with what was seen."""
    machine.nvidia(recorded("nvidia_rtx_3090_ti.txt"))
    machine.answers[("-q",)] = answer
    found = _problem(machine)
    assert found["state"] == state
    assert evidence in found["evidence"]
    assert gather(machine.host())["inference_gpus"] == []


def test_one_lost_card_of_two(machine: Machine) -> None:
    """The card that still answers is usable, the other one is named."""
    machine.nvidia(recorded("nvidia_rtx_3090_ti.txt"))
    machine.card("0000:0d:00.0", "10de:2203", driver="nvidia")
    line = "Unable to determine the device handle for GPU0000:0D:00.0: Unknown Error\n"
    machine.answers[("-q",)] = Answer(255, line + recorded("nvidia_rtx_3090_ti.txt"))
    found = _problem(machine)
    assert found["state"] == "lost"
    assert "0000:0d:00.0" in found["evidence"]
    assert "Unable to determine the device handle" in found["evidence"]
    assert [gpu["pci"] for gpu in gather(machine.host())["inference_gpus"]] == ["0000:05:00.0"]


def test_tool_missing(machine: Machine) -> None:
    """A card without nvidia-smi."""
    machine.card("0000:01:00.0", "10de:1eb0", driver="nouveau")
    found = _problem(machine)
    assert found["state"] == "tool_missing"
    assert "0000:01:00.0" in found["evidence"]
    assert "nouveau" in found["evidence"]


def test_card_of_a_virtual_machine(machine: Machine) -> None:
    """A card that is bound to vfio-pci is not this host's, and no problem of it."""
    machine.card("0000:0e:00.0", "10de:1e81", subsystem="3842:3081", driver="vfio-pci", group=31)
    facts = gather(machine.host())
    assert facts == {"inference_gpus": [], "inference_gpu_problems": [], "inference_gpu_drivers": {}}


def test_mismatch_seen_on_disk(machine: Machine) -> None:
    """An upgraded library beside a loaded old module is found even where nvidia-smi still answers."""
    machine.nvidia(recorded("nvidia_rtx_3090_ti.txt"))
    machine.file("/proc/driver/nvidia/version", recorded("nvidia_module_384.txt"))
    machine.file("/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.580.142")
    (machine.root / "usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1").symlink_to("libnvidia-ml.so.580.142")
    found = _problem(machine)
    assert found["state"] == "driver_mismatch"
    assert "384.98" in found["evidence"]
    assert "580.142" in found["evidence"]
    facts = gather(machine.host())
    assert facts["inference_gpu_drivers"] == {"nvidia": {"version": "384.98", "library_version": "580.142"}}
    assert len(facts["inference_gpus"]) == 1


@pytest.mark.parametrize(
    ("fixture", "version"),
    [("nvidia_module_384.txt", "384.98"), ("nvidia_module_open_565.txt", "565.57.01")],
)
def test_module_version(fixture: str, version: str) -> None:
    """Both kinds of kernel module."""
    assert nvidia.module_version(recorded(fixture)) == version


def test_what_processes_take_is_read_and_what_is_not_said_is_left_out() -> None:
    # Typed by hand after nvidia-smi's documented CSV; [N/A] is what it says under WSL and with MIG.
    text = (
        "4711, GPU-5e2f7f3a-0000-0000-0000-000000000000, 6044\n"
        "4712, GPU-5e2f7f3a-0000-0000-0000-000000000001, [N/A]\n"
        "4713, GPU-5e2f7f3a-0000-0000-0000-000000000001, 512\n"
        "Failed to initialize NVML: Driver/library version mismatch\n"
    )
    assert nvidia.parse_processes(text) == {
        (4711, "GPU-5e2f7f3a-0000-0000-0000-000000000000"): 6044,
        (4713, "GPU-5e2f7f3a-0000-0000-0000-000000000001"): 512,
    }
