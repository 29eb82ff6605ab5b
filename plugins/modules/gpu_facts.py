#!/usr/bin/python
# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which GPUs a machine has."""

from __future__ import annotations

DOCUMENTATION = r"""
module: gpu_facts
version_added: 0.1.0
short_description: Find the GPUs of a machine and what keeps them from being used
description:
  - Returns every GPU that inference can run on, in one shape for all vendors, as facts.
  - NVIDIA cards come from C(nvidia-smi), with their MIG instances. AMD and Intel cards come from sysfs, so that
    neither ROCm nor oneAPI is needed on the node. The GPUs of Apple chips and of Jetson modules share the
    machine's memory. Emulated GPUs come from C(/etc/homelab-inference/emulated-gpus.json).
  - A machine without GPUs gets empty facts and no error.
  - A driver that does not answer is reported in RV(ansible_facts.inference_gpu_problems), not waited for.
  - Cards that are bound to C(vfio-pci) belong to a virtual machine and are left out.
author:
  - homelab.inference contributors (!UNKNOWN)
extends_documentation_fragment:
  - homelab.inference.attributes
  - homelab.inference.attributes.info
options:
  timeout:
    description:
      - How many seconds a vendor's tool may take to answer.
      - After that it is killed, and left behind when even that does not end it.
    type: int
    default: 20
"""

EXAMPLES = r"""
- name: Find the GPUs of all inference nodes
  homelab.inference.gpu_facts:

- name: Stop before anything is restarted on a broken driver
  ansible.builtin.fail:
    msg: "{{ ansible_facts['inference_gpu_problems'][0]['evidence'] }}"
  when: ansible_facts['inference_gpu_problems'] | length > 0

- name: Show the memory of the first GPU in MiB
  ansible.builtin.debug:
    msg: "{{ (ansible_facts['inference_gpus'] | first)['memory_mib'] }}"
  when: ansible_facts['inference_gpus'] | length > 0
"""

RETURN = r"""
ansible_facts:
  description: The facts about this machine's GPUs.
  returned: always
  type: dict
  contains:
    inference_gpus:
      description: The GPUs that can be used, by PCI address; those on no bus follow.
      returned: always
      type: list
      elements: dict
      sample:
        - id: gpu0
          vendor: nvidia
          name: NVIDIA GeForce RTX 3090 Ti
          uuid: GPU-b54a952b-c1a3-5e2f-2e2e-0c99355a7454
          pci: "0000:05:00.0"
          memory_mib: 24564
          memory_kind: dedicated
          cap_mib:
          driver: "580.142"
          architecture: sm_86
          used_mib: 22700
          pci_id: "10de:2203"
          subsystem_id: "1462:5091"
          iommu_group: 30
      contains:
        id:
          description: C(gpu0), C(gpu1) and so on, in the order of this list.
          type: str
          returned: always
        vendor:
          description: C(nvidia), C(amd), C(intel), C(apple), C(tegra) or C(emulated).
          type: str
          returned: always
        name:
          description: The product's name.
          type: str
          returned: always
        uuid:
          description: The identifier by which the vendor's runtime selects the GPU, or null.
          type: str
          returned: always
        pci:
          description: The PCI address, or null for a GPU that is on no PCI bus.
          type: str
          returned: always
        memory_mib:
          description:
            - The GPU's memory in MiB. For unified memory, the memory that it shares with the machine.
            - An Intel card that tells no size, is of no known product and has no resizable BAR shows only the
              part of its memory that the CPU can see.
          type: int
          returned: always
        memory_kind:
          description: C(dedicated), or C(unified) when the GPU shares the machine's memory.
          type: str
          returned: always
        cap_mib:
          description:
            - How much of a unified memory the GPU may take, in MiB, or null where no limit is known.
            - On Apple chips, C(iogpu.wired_limit_mb), or without it two thirds of a memory of up to 36 GiB and three
              quarters of a larger one, which every macOS allows.
            - On AMD APUs, the larger of the firmware's VRAM and the driver's GTT.
          type: int
          returned: always
        driver:
          description: The version of the NVIDIA driver or of Jetson Linux, else the kernel driver's name.
          type: str
          returned: when known
        architecture:
          description: The compute architecture, such as C(sm_86) or C(gfx1201).
          type: str
          returned: when known
        used_mib:
          description: How much memory is in use, in MiB.
          type: int
          returned: when known
        pci_id:
          description: Vendor and product, as in C(10de:2203).
          type: str
          returned: for GPUs on a PCI bus
        subsystem_id:
          description: The card maker's vendor and product.
          type: str
          returned: for GPUs on a PCI bus
        iommu_group:
          description: The IOMMU group.
          type: int
          returned: when the IOMMU is on
        devices:
          description: The device files that a container needs.
          type: list
          elements: str
          returned: for AMD and Intel
        groups:
          description: The numeric groups that own those device files.
          type: list
          elements: int
          returned: for AMD and Intel
        mig:
          description: The MIG instances, each with C(uuid), C(profile) and C(memory_mib).
          type: list
          elements: dict
          returned: when MIG is enabled and instances exist
        endpoint:
          description: Address and port of the RPC server.
          type: str
          returned: for emulated GPUs
    inference_gpu_problems:
      description: What keeps GPUs from being used; empty when all is well.
      returned: always
      type: list
      elements: dict
      sample:
        - vendor: nvidia
          state: driver_mismatch
          evidence: The loaded kernel module is 550.54.14, the library on disk 550.90.07
          remedy: Reboot, or unload and load the nvidia kernel modules; restart no GPU container before that.
      contains:
        vendor:
          description: As in RV(ansible_facts.inference_gpus[].vendor).
          type: str
          returned: always
        state:
          description:
            - C(driver_mismatch), the kernel module and the library are of different versions.
            - C(nvml_lost), the driver's library cannot reach the driver.
            - C(hung), the tool did not answer in time.
            - C(tool_missing), a card is there without the driver or tool that it needs.
            - C(lost), a GPU that should be there does not answer.
          type: str
          returned: always
        evidence:
          description: What was seen.
          type: str
          returned: always
        remedy:
          description: What helps.
          type: str
          returned: always
    inference_gpu_drivers:
      description: The drivers by vendor, each with C(version); for NVIDIA also C(library_version).
      returned: always
      type: dict
      sample:
        nvidia:
          version: "580.142"
          library_version: "580.142"
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.homelab.inference.plugins.module_utils.gpu.emulated import EmulatedListError
from ansible_collections.homelab.inference.plugins.module_utils.gpu.facts import gather
from ansible_collections.homelab.inference.plugins.module_utils.gpu.host import Host


def main() -> None:
    """Gather the facts."""
    module = AnsibleModule(
        argument_spec={"timeout": {"type": "int", "default": 20}},
        supports_check_mode=True,
    )
    try:
        facts = gather(Host(deadline=module.params["timeout"]))
    except EmulatedListError as exc:
        module.fail_json(msg=str(exc))
    module.exit_json(changed=False, ansible_facts=facts)


if __name__ == "__main__":
    main()
