#!/usr/bin/python
# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Thin door to the planner."""

from __future__ import annotations

DOCUMENTATION = r"""
module: vram_plan
short_description: Plan which model runs where
version_added: 0.1.0
author: homelab.inference contributors (!UNKNOWN)
description:
  - Places models on the GPUs and processors of the nodes and says with which llama-server options each one runs. It
    computes, touches no host and changes nothing.
  - Models are placed in the given order, each where it is pinned, else on the first node with room. On one GPU if it
    fits there, else split over the GPUs of the node, else on the processor.
  - What the previous plan had keeps its node, name and port as long as that fits.
  - Memory is estimated from the header of the file, rather too high than too low.
options:
  models:
    description: The registry in normal form, as M(homelab.inference.lab) returns it.
    type: dict
    required: true
  resolved:
    description: Per model its C(files) (name, size in bytes, sha256) and the C(shape) that the header tells.
    type: dict
    required: true
  unresolved:
    description: Per model without an entry in O(resolved) the reason why.
    type: dict
    default: {}
  nodes:
    description:
      - Per inference node its C(devices), C(memory_mib), C(presence), C(library), C(ports) and C(reservations).
      - Sizes are in MiB.
    type: dict
    required: true
  previous:
    description: Instances of the plan in force.
    type: list
    elements: dict
    default: []
extends_documentation_fragment:
  - homelab.inference.attributes
  - homelab.inference.attributes.info
seealso:
  - module: homelab.inference.lab
  - module: homelab.inference.gpu_facts
"""

EXAMPLES = r"""
- name: Plan one model on one card
  homelab.inference.vram_plan:
    models: "{{ lab.models }}"
    resolved: "{{ resolved }}"
    nodes:
      forge:
        devices:
          - {id: gpu0, vendor: nvidia, name: NVIDIA GeForce RTX 3090, memory_mib: 24576, memory_kind: dedicated}
        memory_mib: 64000
        presence: always
        library: []
        ports: []
        reservations: {}
"""

RETURN = r"""
instances:
  description: The planned servers, in start order per node.
  type: list
  elements: dict
  returned: success
  sample:
    - name: chat
      model: chat
      mode: chat
      node: forge
      backend: cuda
      devices: [gpu0]
      port: 8080
      server_options: {ctx-size: 16384, parallel: 2, n-gpu-layers: all, cache-type-k: f16, cache-type-v: f16}
      memory: {gpu0: 9120}
      library: {library: /srv/models, path: chat.gguf}
refused:
  description: Models that have no place, each with the reason and what would help.
  type: list
  elements: dict
  returned: success
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.homelab.inference.plugins.module_utils.placement import plan


def main() -> None:
    """Read the arguments, plan, return."""
    module = AnsibleModule(
        argument_spec={
            "models": {"type": "dict", "required": True},
            "resolved": {"type": "dict", "required": True},
            "unresolved": {"type": "dict", "default": {}},
            "nodes": {"type": "dict", "required": True},
            "previous": {"type": "list", "elements": "dict", "default": []},
        },
        supports_check_mode=True,
    )
    words = module.params
    module.exit_json(
        changed=False,
        **plan(words["models"], words["resolved"], words["nodes"], words["previous"], words["unresolved"]),
    )


if __name__ == "__main__":
    main()
