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
  - Of all plans that keep what the owner promises it takes the one that is worth most. The value of a plan is the sum
    of priority times quality of its servers; C(docs/quality.md) has the table.
  - What the previous plan had keeps its node, devices, name and port, unless a move is worth it.
  - What does not fit is refused by name, with the numbers and with a change that was found to help.
options:
  models:
    description: The registry in normal form, as M(homelab.inference.lab) returns it.
    type: dict
    required: true
  resolved:
    description:
      - Per model its C(files) (name, size in bytes, sha256) and the C(shape) that the header tells.
      - C(variants) is a list of the same for each quant that may run, in order of preference.
    type: dict
    required: true
  unresolved:
    description: Per model without an entry in O(resolved) the reason why.
    type: dict
    default: {}
  nodes:
    description:
      - Per inference node its C(devices), C(memory_mib), C(presence), C(library), C(ports) and C(reservations).
      - A device may have C(used_mib), what others hold of it now, and a node C(memory_used_mib) and C(limit_mib).
      - Sizes are in MiB.
    type: dict
    required: true
  previous:
    description: Instances of the plan in force.
    type: list
    elements: dict
    default: []
  previous_nodes:
    description:
      - The nodes that the plan in force was made from, as this module returned them.
      - A measured figure that differs from them by no more than 2 % of the size counts as unchanged.
    type: dict
    default: {}
  in_force:
    description:
      - The whole plan in force, as this module returned it, or the lock that keeps it.
      - Where it was made from the same facts it is returned as it is.
    type: dict
    default: {}
  recovery:
    description:
      - Refuse nothing. What is worth less by its priority makes way, and RV(waiting) says what waits for what.
    type: bool
    default: false
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
  description: The planned servers, in the order of the registry, which is the start order on each node.
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
      memory: {gpu0: 9120, host: 180}
      library: {library: /srv/models, path: chat.gguf}
      quant: Q4_K_M
      variant: 0
      start: 1
      stop_first: []
      fit: one_gpu
      quality: 1.0
      turns: []
refused:
  description:
    - Models that have no place, or not as many as they want. Each with the reason, the device, what is needed there and
      what there is in MiB, and the cheapest change that helps, which was tried by planning with it.
  type: list
  elements: dict
  returned: success
waiting:
  description: With O(recovery=true) the models without a place, and what each waits for.
  type: list
  elements: dict
  returned: success
devices:
  description: Per node and device (or C(host), its main memory) the size, who holds what, and what is left, in MiB.
  type: dict
  returned: success
survival:
  description: Per node, and per card where a node has several, which models go on answering without it.
  type: list
  elements: dict
  returned: success
order:
  description: Per node the names of its servers in start order.
  type: dict
  returned: success
value:
  description: Sum of priority times quality of all planned servers.
  type: float
  returned: success
nodes:
  description: The nodes as they were planned with, hardly changed figures being those of O(previous_nodes).
  type: dict
  returned: success
inputs:
  description: Digest of all that the plan was made from.
  type: str
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
            "previous_nodes": {"type": "dict", "default": {}},
            "in_force": {"type": "dict", "default": {}},
            "recovery": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    words = module.params
    module.exit_json(
        changed=False,
        **plan(
            words["models"],
            words["resolved"],
            words["nodes"],
            words["previous"],
            unresolved=words["unresolved"],
            recovery=words["recovery"],
            previous_nodes=words["previous_nodes"],
            in_force=words["in_force"],
        ),
    )


if __name__ == "__main__":
    main()
