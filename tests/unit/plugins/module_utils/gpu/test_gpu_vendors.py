# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""AMD, Intel, Apple, Tegra and emulated devices, and machines without any."""

from __future__ import annotations

import json
import re

import pytest
from ansible_collections.homelab.inference.plugins.module_utils.gpu import amd, apple, intel, pci
from ansible_collections.homelab.inference.plugins.module_utils.gpu.command import Answer
from ansible_collections.homelab.inference.plugins.module_utils.gpu.emulated import LIST, EmulatedListError
from ansible_collections.homelab.inference.plugins.module_utils.gpu.facts import gather
from ansible_collections.homelab.inference.tests.unit.plugins.module_utils.gpu.gpu_machine import Machine, recorded

NOTHING = {"inference_gpus": [], "inference_gpu_problems": [], "inference_gpu_drivers": {}}


def test_machine_without_gpu(machine: Machine) -> None:
    """No card, no file, no error."""
    machine.card("0000:00:01.0", "1af4:1041", kind="0x020000")
    assert gather(machine.host()) == NOTHING


def test_graphics_that_cannot_compute(machine: Machine) -> None:
    """A server's remote console is no GPU."""
    machine.card("0000:c4:00.0", "1a03:2000", driver="ast")
    assert gather(machine.host()) == NOTHING


def _r9700(machine: Machine) -> str:
    agent = dict(re.findall(r"^ +(.+?): +(\S+)", recorded("amd_r9700_rocminfo.txt"), re.MULTILINE))
    size = int(re.search(r"Size: +(\d+)\(\w+\) KB", recorded("amd_r9700_pool.txt"))[1]) * 1024
    location, chip = int(agent["BDFID"]), re.search(r"0x(\w+)", agent["Chip ID"])[1]
    address = f"0000:{location >> 8:02x}:00.0"
    folder = machine.card(address, f"1002:{chip}", driver="amdgpu", group=17)
    machine.render_node(folder)
    machine.file("/dev/kfd")
    machine.file(f"{amd.NODES}/0/properties", "cpu_cores_count 20\nsimd_count 0\n")
    machine.file(
        f"{amd.NODES}/{agent['Node']}/properties",
        f"simd_count 128\ngfx_target_version 120001\nlocation_id {location}\ndomain 0\n",
    )
    assert amd.gfx_target(120001) == agent["Name"]
    machine.file("/usr/share/misc/pci.ids", recorded("synthetic_pci_ids.txt"))
    machine.file(f"{folder}/mem_info_vram_total", f"{size}\n")
    machine.file(f"{folder}/mem_info_vram_used", "29200384\n")
    machine.file(f"{folder}/unique_id", f"{agent['Uuid'][4:]}\n")
    return folder


def test_radeon_ai_pro_r9700(machine: Machine) -> None:
    """A card of its own memory, with the identifier that ROCm gives it and the groups a container must join."""
    _r9700(machine)
    machine.file("/proc/sys/kernel/osrelease", "6.12.48+deb13-amd64\n")
    facts = gather(machine.host())
    assert facts["inference_gpus"] == [
        {
            "id": "gpu0",
            "vendor": "amd",
            "name": "AMD Navi 48 [Radeon AI PRO R9700]",
            "uuid": "GPU-3919877325193652",
            "pci": "0000:0d:00.0",
            "memory_mib": 30576,
            "memory_kind": "dedicated",
            "cap_mib": None,
            "driver": "amdgpu",
            "architecture": "gfx1201",
            "used_mib": 27,
            "devices": ["/dev/kfd", "/dev/dri/renderD128"],
            "groups": [(machine.root / "dev/kfd").stat().st_gid],
            "pci_id": "1002:7551",
            "iommu_group": 17,
        }
    ]
    assert facts["inference_gpu_drivers"] == {"amd": {"version": "6.12.48+deb13-amd64"}}


def test_amd_card_that_gave_up(machine: Machine) -> None:
    """amdgpu without memory sizes is a lost card."""
    (machine.root / _r9700(machine).lstrip("/") / "mem_info_vram_total").unlink()
    facts = gather(machine.host())
    assert facts["inference_gpus"] == []
    assert [found["state"] for found in facts["inference_gpu_problems"]] == ["lost"]


def test_amd_card_without_kernel_module(machine: Machine) -> None:
    """A kernel without amdgpu."""
    machine.card("0000:05:00.0", "1002:7551")
    facts = gather(machine.host())
    assert [(found["vendor"], found["state"]) for found in facts["inference_gpu_problems"]] == [("amd", "tool_missing")]


def test_strix_halo(machine: Machine) -> None:
    """An APU: the machine's memory, as much of it as the larger heap has."""
    folder = machine.card_of_lspci(recorded("amd_strix_halo_lspci.txt"), "amdgpu")
    assert folder.endswith("/0000:c5:00.0")
    for name, size in re.findall(r"device/(\w+)\n(\d+)", recorded("amd_strix_halo_memory.txt")):
        machine.file(f"{folder}/{name}", f"{size}\n")
    machine.file(f"{folder}/mem_info_vram_used", "477827072\n")
    machine.file(f"{folder}/unique_id", "0000000000000000\n")
    machine.file(
        f"{amd.NODES}/1/properties", recorded("amd_strix_halo_kfd.txt") + f"location_id {0xC5 << 8}\ndomain 0\n"
    )
    (found,) = gather(machine.host())["inference_gpus"]
    assert found == {
        "id": "gpu0",
        "vendor": "amd",
        "name": "AMD GPU 1002:1586",
        "uuid": None,
        "pci": "0000:c5:00.0",
        "memory_mib": 102400,
        "memory_kind": "unified",
        "cap_mib": 98304,
        "driver": "amdgpu",
        "architecture": "gfx1151",
        "pci_id": "1002:1586",
    }


@pytest.mark.parametrize(
    ("version", "target"), [(120001, "gfx1201"), (110501, "gfx1151"), (90010, "gfx90a"), (100306, "gfx1036"), (0, None)]
)
def test_gfx_target(version: int, target: str | None) -> None:
    """The kernel's number and the compiler's name."""
    assert amd.gfx_target(version) == target


def _resource(line: str) -> str:
    start, size = re.search(r"Memory at (\w+) .*\[size=(\d+)G\]", line).groups()
    low, high = int(start, 16), int(start, 16) + int(size) * 2**30 - 1
    unused = f"0x{0:016x} 0x{0:016x} 0x{0:016x}\n"
    return f"0x00000000fb000000 0x00000000fbffffff 0x0000000000140204\n{unused}0x{low:016x} 0x{high:016x} 0x14220c\n"


def test_arc_a310(machine: Machine) -> None:
    """The card of the media machine, here with the kernel's driver instead of vfio-pci."""
    folder = machine.card_of_lspci(recorded("intel_arc_a310_lspci.txt"), "i915")
    machine.render_node(folder)
    machine.file(f"{folder}/resource", _resource(recorded("intel_arc_a310_bar.txt")))
    machine.file("/usr/share/misc/pci.ids", recorded("synthetic_pci_ids.txt"))
    (found,) = gather(machine.host())["inference_gpus"]
    assert found == {
        "id": "gpu0",
        "vendor": "intel",
        "name": "Intel DG2 [Arc A310]",
        "uuid": None,
        "pci": "0000:03:00.0",
        "memory_mib": 4096,
        "memory_kind": "dedicated",
        "cap_mib": None,
        "driver": "i915",
        "devices": ["/dev/dri/renderD128"],
        "groups": [(machine.root / "dev/dri/renderD128").stat().st_gid],
        "pci_id": "8086:56a6",
        "subsystem_id": "172f:4019",
    }
    assert intel.bar_size(_resource(recorded("intel_arc_a310_bar.txt"))) == intel.KNOWN["56a6"] * 1024 * 1024


def test_arc_a770_has_the_size_of_its_window(machine: Machine) -> None:
    """It is sold with 8 and with 16 GB: its resized BAR tells which."""
    text = recorded("intel_arc_a770_lspci.txt")
    window = next(line for line in text.splitlines() if "Region 2" in line)
    folder = machine.card("0000:09:00.0", "8086:56a0", driver="xe", group=19)
    machine.file(f"{folder}/resource", _resource(window))
    (found,) = gather(machine.host())["inference_gpus"]
    assert (found["memory_mib"], found["iommu_group"], found["driver"]) == (16384, 19, "xe")


@pytest.mark.parametrize(("product", "size"), [("56a5", 6144), ("56b0", 8192)])
def test_known_product_before_its_window(machine: Machine, product: str, size: int) -> None:
    """A window is a power of two: an A380 of 6 GB has one of 8. Of a product not known, it is all there is to see."""
    folder = machine.card("0000:03:00.0", f"8086:{product}", driver="i915")
    machine.file(f"{folder}/resource", _resource("Memory at 6000000000 (64-bit, prefetchable) [size=8G]"))
    (found,) = gather(machine.host())["inference_gpus"]
    assert found["memory_mib"] == size


def test_xe_tells_the_size(machine: Machine) -> None:
    """What the driver tells goes before everything else."""
    folder = machine.card("0000:03:00.0", "8086:e20b", driver="xe")
    machine.file(f"{folder}/tile0/physical_vram_size_bytes", f"{12 * 2**30 + 2**20}\n")
    (found,) = gather(machine.host())["inference_gpus"]
    assert found["memory_mib"] == 12 * 1024 + 1


def test_integrated_intel_graphics_share_the_memory(machine: Machine) -> None:
    """The NUC's own graphics; without a driver they are nobody's problem."""
    folder = machine.card("0000:00:02.0", "8086:46a6")
    assert gather(machine.host()) == NOTHING
    machine.file("/proc/meminfo", recorded("synthetic_meminfo.txt"))
    machine.link(f"{folder}/driver", "/sys/bus/pci/drivers/i915")
    (found,) = gather(machine.host())["inference_gpus"]
    assert (found["memory_kind"], found["memory_mib"], found["cap_mib"]) == ("unified", 62827, None)


def test_apple_m3_ultra(machine: Machine) -> None:
    """96 GB, of which 72 GiB may be relied on as long as nobody says otherwise: no more than Metal recommends."""
    names = (apple.CHIP, apple.MEMORY, apple.LIMIT)
    machine.answers[names] = Answer(1, recorded("apple_m3_ultra_sysctl.txt") + "sysctl: unknown oid 'iogpu'\n")
    facts = gather(machine.host("Darwin"))
    assert facts["inference_gpus"] == [
        {
            "id": "gpu0",
            "vendor": "apple",
            "name": "Apple M3 Ultra",
            "uuid": None,
            "pci": None,
            "memory_mib": 98304,
            "memory_kind": "unified",
            "cap_mib": 73728,
        }
    ]
    recommended = re.search(r"recommendedMaxWorkingSetSize += ([\d.]+) MB", recorded("apple_m3_ultra_llama_cpp.txt"))
    assert facts["inference_gpus"][0]["cap_mib"] <= float(recommended[1]) * 1e6 / 2**20
    machine.answers[names] = Answer(0, recorded("synthetic_apple_sysctl_limit.txt"))
    assert gather(machine.host("Darwin"))["inference_gpus"][0]["cap_mib"] == 90112
    assert gather(machine.host("Linux")) == NOTHING


def test_default_caps_of_metal() -> None:
    """The sizes that llama.cpp printed, in MiB: 21845.34 of 32 GB and 48 of 64 GiB."""
    assert apple.default_cap(32 * 1024) == 21845
    assert apple.default_cap(64 * 1024) == 48 * 1024


def _orin(machine: Machine) -> None:
    machine.file("/etc/nv_tegra_release", recorded("tegra_agx_orin_release.txt"))
    machine.file("/proc/device-tree/model", recorded("tegra_agx_orin_model.txt"))
    machine.file("/proc/device-tree/compatible", recorded("tegra_agx_orin_compatible.txt"))
    machine.file("/proc/meminfo", recorded("tegra_agx_orin_meminfo.txt"))


def test_jetson_agx_orin(machine: Machine) -> None:
    """The chip's GPU has the machine's memory, as much as NVIDIA's own tool sees."""
    _orin(machine)
    facts = gather(machine.host())
    assert facts["inference_gpus"] == [
        {
            "id": "gpu0",
            "vendor": "tegra",
            "name": "NVIDIA Jetson AGX Orin Developer Kit",
            "uuid": None,
            "pci": None,
            "memory_mib": 62841,
            "memory_kind": "unified",
            "cap_mib": None,
            "driver": "R39.2.0",
            "architecture": "sm_87",
        }
    ]
    seen = re.search(r" RAM \d+/(\d+)MB ", recorded("tegra_agx_orin_tegrastats.txt"))
    assert facts["inference_gpus"][0]["memory_mib"] == int(seen[1])
    assert facts["inference_gpu_drivers"] == {"tegra": {"version": "R39.2.0"}}


def test_jetson_with_a_card(machine: Machine) -> None:
    """What nvidia-smi says of the chip's own GPU is not a second device; a card beside it is."""
    _orin(machine)
    own = "\nGPU 00000000:00:00.0\n    Product Name : Orin (nvgpu)\n    FB Memory Usage\n        Total : N/A\n"
    machine.nvidia(recorded("nvidia_rtx_3090_ti.txt"))
    machine.answers[("-q",)] = Answer(0, recorded("nvidia_rtx_3090_ti.txt") + own)
    devices = gather(machine.host())["inference_gpus"]
    assert [(found["id"], found["vendor"]) for found in devices] == [("gpu0", "nvidia"), ("gpu1", "tegra")]


def test_emulated(machine: Machine) -> None:
    """A listed server that listens is a device; one that does not is lost."""
    entries = [
        {"name": f"Emulated {index}", "uuid": f"EMU-{index}", "endpoint": f"172.17.0.1:5005{index}", "memory_mib": 2048}
        for index in (2, 3)
    ]
    machine.file(LIST, json.dumps(entries))
    machine.listening.add("172.17.0.1:50053")
    facts = gather(machine.host())
    assert facts["inference_gpus"] == [
        {
            "id": "gpu0",
            "vendor": "emulated",
            "name": "Emulated 3",
            "uuid": "EMU-3",
            "pci": None,
            "memory_mib": 2048,
            "memory_kind": "dedicated",
            "cap_mib": None,
            "endpoint": "172.17.0.1:50053",
        }
    ]
    (problem,) = facts["inference_gpu_problems"]
    assert (problem["vendor"], problem["state"]) == ("emulated", "lost")
    assert "Emulated 2 does not answer on 172.17.0.1:50052" in problem["evidence"]


@pytest.mark.parametrize(
    "text", ["{", '[{"name": "a"}]', "[1]", '[{"name": "a", "endpoint": "b:1", "uuid": 1, "memory_mib": "x"}]']
)
def test_unusable_list_of_emulated_gpus(machine: Machine, text: str) -> None:
    """The error names the file and what it should be."""
    machine.file(LIST, text)
    with pytest.raises(EmulatedListError, match=f"Reading {LIST} failed: .*Make it a JSON list"):
        gather(machine.host())


def test_numbers_across_vendors(machine: Machine) -> None:
    """One numbering for all: by address, then what is on no bus."""
    _r9700(machine)
    machine.nvidia(recorded("nvidia_rtx_4090.txt"))
    machine.file(LIST, json.dumps([{"name": "E", "uuid": "EMU-0", "endpoint": "127.0.0.1:1", "memory_mib": 1}]))
    machine.listening.add("127.0.0.1:1")
    devices = gather(machine.host())["inference_gpus"]
    assert [(found["id"], found["vendor"]) for found in devices] == [
        ("gpu0", "nvidia"),
        ("gpu1", "amd"),
        ("gpu2", "emulated"),
    ]


def test_pci_names() -> None:
    """A product is looked up under its own vendor only."""
    names = recorded("synthetic_pci_ids.txt")
    assert pci.find_name(names, "8086", "56a6") == "DG2 [Arc A310]"
    assert pci.find_name(names, "1002", "56a6") is None
    assert pci.find_name(names, "10de", "2203") is None
