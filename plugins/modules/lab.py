#!/usr/bin/python
# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation of the action plugin of the same name."""

from __future__ import annotations

DOCUMENTATION = r"""
module: lab
short_description: Read, validate and derive the declared lab
version_added: 0.1.0
author: homelab.inference contributors (!UNKNOWN)
description:
  - Reads C(lab_*) and C(node_*) of all hosts and the groups C(control), C(inference) and C(library), validates the
    whole of it and derives what each role on each host needs.
  - Works on the controller alone and contacts no host. All problems are reported in one run, a sentence each.
  - Where hosts have told facts earlier in the playbook (M(homelab.inference.gpu_facts), memory, model library), these
    are handed on for planning.
options:
  lock:
    description:
      - The lock to derive from. In check mode, where no file is written, this hands the plan to the plays that follow.
      - By default the file is read, if there is one.
    type: dict
  exclusive:
    description:
      - What this run is called, for example C(site.yml). It waits until no other such run changes the lab, and says for
        whom.
      - The lab is free when the process of that run has ended, however it ended. In check mode nobody waits.
    type: str
  patience:
    description: How long it waits for another run, in seconds.
    type: int
    default: 3600
  seal:
    description:
      - Keep the declaration, without secrets, and the lock beside it as the newest of five generations. Recovery works
        from there, whatever is edited meanwhile. Not in check mode.
    type: bool
    default: false
  lost:
    description: Nodes that are dead. What ran there is placed on those that remain, as far as it fits; see RV(moves).
    type: list
    elements: str
    default: []
  closed:
    description: Nodes that keep what they have then, and get nothing.
    type: list
    elements: str
    default: []
notes:
  - Run it once per playbook, with C(run_once), and register the result.
attributes:
  action:
    description: Runs on the controller.
    support: full
extends_documentation_fragment:
  - homelab.inference.attributes
  - homelab.inference.attributes.info
seealso:
  - module: homelab.inference.vram_plan
"""

EXAMPLES = r"""
- name: Read the declaration
  hosts: all
  gather_facts: false
  tasks:
    - name: Read the declaration
      homelab.inference.lab:
      register: lab
      run_once: true
"""

RETURN = r"""
declaration:
  description: What the owner wrote, C(lab), C(nodes) and C(groups), without secrets.
  type: dict
  returned: success
declared:
  description: The part of it that a plan is made from; the lock keeps it.
  type: dict
  returned: success
images:
  description: Image references by role variable.
  type: dict
  returned: success
plain_http:
  description: Registries that speak plain HTTP.
  type: list
  elements: str
  returned: success
models:
  description:
    - The models that llama-server runs, in the order in which they keep their place.
    - In normal form - every default filled in, every ladder a list.
  type: dict
  returned: success
nodes:
  description: Per inference node what the planner has to know, sizes in MiB.
  type: dict
  returned: success
libraries:
  description: Per host the model files that lie there.
  type: dict
  returned: success
lock:
  description: The lock, or null where there is none yet.
  type: dict
  returned: success
lock_file:
  description: Path of the lock.
  type: str
  returned: success
measured_file:
  description: Path of the file that keeps what servers took.
  type: str
  returned: success
measured:
  description:
    - That file as it is now, in C(text), and in C(sentences) which servers took something else than was planned.
  type: dict
  returned: when the playbook has asked the servers (C(__lab_taken))
untold_file:
  description: File that is there while the control node has not been told what was moved and who is in maintenance.
  type: str
  returned: success
moves:
  description:
    - What runs elsewhere than planned because a node is dead, as file C(.lab.moves.json) has it.
    - Empty where nothing does.
  type: dict
  returned: success
moved:
  description: The same, a sentence each.
  type: list
  elements: str
  returned: success
moves_file:
  description: Path of the file that recovery keeps it in.
  type: str
  returned: success
maintenance:
  description: The hosts that are in maintenance, and until when, as ISO time.
  type: dict
  returned: success
maintenance_file:
  description: Path of the file that playbook C(maintenance.yml) keeps them in.
  type: str
  returned: success
generations:
  description: Directory in which the sealed generations lie.
  type: str
  returned: success
healer:
  description:
    - The host with the alert door in C(host), empty where the lab has none; in C(state) the directory there with
      what it knows of the lab, and in C(here) whether this run works from that directory.
  type: dict
  returned: success
guests:
  description: The hosts that may be off, or busy with something else.
  type: list
  elements: str
  returned: success
reports:
  description: Directory in which recovery keeps its reports.
  type: str
  returned: success
inventory_dir:
  description: Directory of the inventory; relative paths of model files start there.
  type: str
  returned: success
stale:
  description: How the declaration differs from the one that the lock was made for, a sentence each.
  type: list
  elements: str
  returned: success
views:
  description: Per host its roles and what each needs.
  type: dict
  returned: when the lock fits the declaration, or there is none
servers:
  description:
    - "Each model server: its name, host and unit, when it starts there, its models and GPUs, and its endpoint."
  type: list
  elements: dict
  returned: when the lock fits the declaration, or there is none
endpoints:
  description: Everything whose health can be asked for, in the shape of M(homelab.inference.health_probe).
  type: list
  elements: dict
  returned: when the lock fits the declaration, or there is none
secrets_missing:
  description: Names of secrets that are to be generated.
  type: list
  elements: str
  returned: success
secrets_file:
  description: Path of the file that generated secrets are written to.
  type: str
  returned: success
generation:
  description: Number of the generation that was sealed, or that holds the same already.
  type: int
  returned: when O(seal) and there is a lock
goes_away:
  description:
    - Per host what was made there earlier and is no longer wanted, as far as the playbook has looked (C(__lab_made)).
  type: dict
  returned: when the lock fits the declaration, or there is none
rolling:
  description:
    - Hosts on which model servers that run are changed or leave, as far as the playbook has looked (C(__lab_slice)).
  type: list
  elements: str
  returned: when the lock fits the declaration, or there is none
owed:
  description:
    - Per host the model servers that are not there as they are planned now, as far as the playbook has looked
      (C(__lab_slice)).
  type: dict
  returned: when the lock fits the declaration, or there is none
given_up:
  description:
    - What would be served by nobody if site.yml went on, a sentence each, as far as it has noted which hosts are ready
      (C(__lab_servers_up), C(__lab_gateway_up)).
  type: list
  elements: str
  returned: when the lock fits the declaration, or there is none
most_goes_away:
  description: Whether that is more than half of all there is.
  type: bool
  returned: when the lock fits the declaration, or there is none
"""
