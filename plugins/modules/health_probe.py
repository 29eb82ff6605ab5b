#!/usr/bin/python
# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

DOCUMENTATION = r"""
---
module: health_probe
short_description: Tell how the endpoints of a lab are, per tier and over all
version_added: 0.1.0
description:
  - Asks all endpoints side by side, each with its own deadline, and takes no longer than the longest of them.
  - A llama-server is asked from cheap to dear, C(/health), C(/slots), then for one token, so that a busy server is told
    from one that hangs. The gateway is asked for itself alone, never for the models behind it.
  - An endpoint that does not answer is reported; it does not make the module fail.
author:
  - homelab.inference contributors (!UNKNOWN)
extends_documentation_fragment:
  - homelab.inference.attributes.info
options:
  endpoints:
    description: What to ask.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: What people call it.
        type: str
        required: true
      url:
        description:
          - For O(endpoints[].kind=http) the whole address, which must answer 200.
          - For the other kinds the base address, without C(/v1) or C(/health).
        type: str
        required: true
      tier:
        description:
          - "Endpoints of one tier are judged together. The tier V(GATEWAY) is special: nothing is served without it."
        type: str
        default: REMOTE
      timeout:
        description:
          - Deadline in seconds for this endpoint, name resolution and all steps included.
        type: float
        default: 8
      kind:
        description:
          - What the endpoint is. V(http) is asked for its O(endpoints[].url), V(litellm) for C(/health/liveliness),
            V(ollama) for C(/api/version), V(llamacpp) as described above.
        type: str
        choices: [http, llamacpp, litellm, ollama]
        default: http
      mode:
        description:
          - Whether a llama-server is asked for a token or for an embedding.
          - With V(turns) it is one whose models take turns. It is asked which of them is awake, and woken by nothing.
        type: str
        choices: [chat, embedding, turns]
        default: chat
      may_be_away:
        description: Whether its machine may be off, or needed for something else by its owner. That is no fault.
        type: bool
        default: false
      api_key:
        description: The key of this llama-server, where it differs from O(api_key).
        type: str
  api_key:
    description: The key of the llama-servers that want one.
    type: str
"""

EXAMPLES = r"""
- name: Ask the lab
  homelab.inference.health_probe:
    endpoints:
      - name: gateway
        url: http://10.0.10.5:4000
        tier: GATEWAY
        kind: litellm
      - name: chat on forge
        url: http://10.0.10.20:8080
        tier: REMOTE
        kind: llamacpp
      - name: models on nas
        url: http://10.0.10.40:5000/webapi/query.cgi
        tier: NAS
        timeout: 3
    api_key: "{{ lab_secret_llamacpp_api_key }}"
  register: health

- name: Show it
  ansible.builtin.debug:
    msg: "{{ health.table.splitlines() }}"
"""

RETURN = r"""
results:
  description: One entry per endpoint, in the order in which they were given.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: As given.
      type: str
    url:
      description: As given.
      type: str
    tier:
      description: As given.
      type: str
    kind:
      description: As given.
      type: str
    state:
      description:
        - V(STARTING) it loads its model. V(HEALTHY) it does what it is there for. V(BUSY) it works on other requests.
        - V(DEGRADED) it answers with an error. V(HUNG) it accepts connections and nothing moves.
        - V(DOWN) it does not answer. V(AWAY) neither, and it need not (O(endpoints[].may_be_away)).
      type: str
      sample: HEALTHY
    evidence:
      description: What was seen, step by step; the last entry decided.
      type: list
      elements: str
      sample: ["/health: 200", "/slots: 0 of 2 at work", "/v1/chat/completions: 200"]
    seconds:
      description: How long it took.
      type: float
      sample: 0.05
tiers:
  description:
    - The verdict per tier. V(HEALTHY) when every endpoint of it serves (V(HEALTHY) or V(BUSY)), V(DEGRADED) when some
      do, V(DOWN) when none does. Those that are V(AWAY) are left out; V(AWAY) is a tier of which all are.
  returned: success
  type: dict
  sample: {GATEWAY: HEALTHY, REMOTE: DEGRADED}
overall:
  description:
    - V(DOWN) when the gateway is down or no other tier serves, else V(DEGRADED) when any tier is V(DEGRADED) or
      V(DOWN), else V(HEALTHY).
  returned: success
  type: str
  sample: DEGRADED
table:
  description: All of it as a table for people.
  returned: success
  type: str
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.homelab.inference.plugins.module_utils import probe


def main() -> None:
    endpoint = {
        "name": {"type": "str", "required": True},
        "url": {"type": "str", "required": True},
        "tier": {"type": "str", "default": "REMOTE"},
        "timeout": {"type": "float", "default": 8},
        "kind": {"type": "str", "choices": ["http", "llamacpp", "litellm", "ollama"], "default": "http"},
        "mode": {"type": "str", "choices": ["chat", "embedding", "turns"], "default": "chat"},
        "may_be_away": {"type": "bool", "default": False},
        "api_key": {"type": "str", "no_log": True},
    }
    spec = {
        "endpoints": {"type": "list", "elements": "dict", "required": True, "options": endpoint},
        "api_key": {"type": "str", "no_log": True},
    }
    module = AnsibleModule(argument_spec=spec, supports_check_mode=True)
    api_key = module.params["api_key"]
    endpoints = [{**one, "api_key": one["api_key"] or api_key} for one in module.params["endpoints"]]
    results = probe.probe_all(endpoints)
    verdict = probe.prognosis(results)
    module.exit_json(changed=False, results=results, table=probe.table(results, verdict), **verdict)


if __name__ == "__main__":
    main()
