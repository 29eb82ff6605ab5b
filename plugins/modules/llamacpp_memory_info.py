#!/usr/bin/python
# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
---
module: llamacpp_memory_info
short_description: Tell what memory running model servers took
version_added: 0.1.0
description:
  - Reads, from the log that a llama-server wrote when it started, how much memory each of its buffers takes on which
    device. Nothing is asked of the server itself and nothing is changed.
  - The server has to run with C(--verbosity 4) or more, as M(homelab.inference.llamacpp_container) starts it.
  - A server whose log cannot be read is named in RV(problems); the module does not fail for it.
author:
  - homelab.inference contributors (!UNKNOWN)
extends_documentation_fragment:
  - homelab.inference.attributes.info
options:
  servers:
    description: The containers to look at.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Name of the container.
        type: str
        required: true
      devices:
        description: Names for the devices that the server was given, in its order.
        type: list
        elements: str
        default: []
seealso:
  - module: homelab.inference.llamacpp_container
  - module: homelab.inference.vram_plan
"""

EXAMPLES = r"""
- name: What did the server take
  homelab.inference.llamacpp_memory_info:
    servers: [{name: llamacpp-chat, devices: [gpu0]}]
  register: taken

- name: Say it
  ansible.builtin.debug:
    msg: "{{ taken.servers['llamacpp-chat'].memory.gpu0 }}"
"""

RETURN = r"""
servers:
  description: Per container what it took.
  returned: always
  type: dict
  contains:
    image_id:
      description: The ID of the image that it runs.
      type: str
    started_at:
      description: When it was last started.
      type: str
      sample: "2026-11-21T08:13:17.903806978Z"
    layers:
      description:
        - How many layers lie on devices, and how many there are, the output counted as one.
        - V(null) for a server without devices.
      type: list
      elements: int
      sample: [33, 33]
    process:
      description:
        - Per NVIDIA card, what the driver says that the server's process takes of it, in MiB. What is above the buffers
          is the driver's own part.
        - Empty where no nvidia-smi says it.
      type: dict
      sample: {gpu0: 6044}
    memory:
      description:
        - Per device, and for C(host), the size of each kind of buffer in MiB.
        - Kinds are C(model), C(repack), C(kv), C(recurrent), C(compute), C(output), C(projector), C(lora) and
          C(moe_cache).
      type: dict
      sample: {gpu0: {model: 4403.49, kv: 1024.0, compute: 132.05}, host: {model: 281.81, compute: 48.01, output: 0.98}}
problems:
  description: The containers of which nothing is known, each with one sentence.
  returned: always
  type: list
  elements: dict
  contains:
    name:
      description: Name of the container.
      type: str
    error:
      description: What is wrong and what to do.
      type: str
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.homelab.inference.plugins.module_utils.container import (
    ContainerError,
    connect,
    of_process,
    start_log,
)
from ansible_collections.homelab.inference.plugins.module_utils.gpu.host import Host
from ansible_collections.homelab.inference.plugins.module_utils.gpu.nvidia import processes
from ansible_collections.homelab.inference.plugins.module_utils.llama_log import (
    LlamaLogError,
    buffers,
    of_instance,
    offloaded,
)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "servers": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "name": {"type": "str", "required": True},
                    "devices": {"type": "list", "elements": "str", "default": []},
                },
            },
        },
        supports_check_mode=True,
    )
    servers, problems = {}, []
    try:
        client = connect()
    except ContainerError as error:
        module.fail_json(msg=str(error))
    taken = processes(Host()) if any(server["devices"] for server in module.params["servers"]) else {}
    for server in module.params["servers"]:
        name = server["name"]
        try:
            found, text = start_log(client, name)
            servers[name] = {
                **found,
                "process": of_process(client, name, server["devices"], taken),
                # A server of the processor alone does not speak of layers.
                "layers": list(offloaded(text)) if server["devices"] else None,
                "memory": of_instance(buffers(text), server["devices"]),
            }
        except (ContainerError, LlamaLogError) as error:
            problems.append({"name": name, "error": f"Reading the memory of {name} failed: {error}"})
    module.exit_json(changed=False, servers=servers, problems=problems)


if __name__ == "__main__":
    main()
