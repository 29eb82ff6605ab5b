#!/usr/bin/python
# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
---
module: llamacpp_container
short_description: Run a llama.cpp server in a Docker container
version_added: 0.1.0
description:
  - Makes the container of one C(llama-server), compares it with what is wanted, replaces it where it differs, and
    waits until the server has made its first token.
  - What a deployment depends on is always said on the command line and never left to a default of the build. These
    are C(--host), C(--port), C(--metrics), C(--device), C(--fit off), C(--cache-ram) (V(0)) and
    C(--verbosity) (V(4), by which M(homelab.inference.llamacpp_memory_info) reads what the server took) unless
    O(server_options) has them, and C(--threads) (where O(cpus) is given). A GPU that is missing therefore stops the
    server instead of letting it serve from the CPU.
  - The successor's image is pulled first. The old container is stopped and kept as O(name)C(-previous) until the
    new one answers, and is started again when the new one does not. A run that was interrupted is finished or taken
    back by the next one.
  - The restart policy is always V(no), since an engine that restarts would start all servers of a node at once.
    Starting at boot and after a crash is the work of O(unit).
  - The container has no capabilities (C(IPC_LOCK) where O(server_options) asks for C(mlock)), no new privileges and
    a read-only root file system with a small C(/tmp).
author:
  - homelab.inference contributors (!UNKNOWN)
extends_documentation_fragment:
  - homelab.inference.attributes
attributes:
  check_mode:
    support: full
    details:
      - Also works where engine, image or volume are still missing.
  diff_mode:
    support: full
    details:
      - Shows the values that differ. Of the API key it shows a keyed digest.
  idempotent:
    support: full
options:
  name:
    description:
      - Name of the container. The name with C(-previous) at its end is used while it is replaced.
      - A container of that name which this collection did not make is refused and left untouched.
    type: str
    required: true
  state:
    description:
      - V(started) makes the container and has it answer.
      - V(present) makes the container and does not start it; one that has to be replaced is stopped.
      - V(absent) removes the container. Volume, image and model stay.
    type: str
    choices: [started, present, absent]
    default: started
  image:
    description:
      - Full reference of the image, with a version or a digest. Required unless O(state=absent).
      - Images are compared by their ID, so that a tag that was moved replaces the container.
      - The entry point of the image is used; where it has none, C(llama-server) is.
    type: str
  pull:
    description:
      - When to ask the registry for the image.
    type: str
    choices: [missing, always, never]
    default: missing
  backend:
    description:
      - What the server computes with. V(emulated) are C(ggml-rpc-server) processes that stand in for GPUs.
    type: str
    choices: [cpu, cuda, rocm, vulkan, sycl, emulated]
    default: cpu
  devices:
    description:
      - The cards that the server uses, in the order in which C(tensor-split) and C(main-gpu) count them, as
        M(homelab.inference.gpu_facts) returns them. None for O(backend=cpu).
      - NVIDIA cards are requested from the engine's C(nvidia) driver by UUID. Newer engines answer that request
        through CDI where the toolkit offers it.
      - Tegra modules use the runtime C(nvidia). AMD and Intel cards are reached by their device nodes and numeric
        groups.
      - Of each dictionary these keys are read. C(id) and C(vendor) always, C(uuid) for NVIDIA, C(endpoint) for
        emulated cards, and for AMD and Intel C(devices) (paths; without them all of C(/dev/dri)) and C(groups)
        (numeric).
    type: list
    elements: dict
    default: []
  server_options:
    description:
      - Long options of C(llama-server) without their dashes.
      - V(true) gives the bare option and V(false) its C(--no-) form, or nothing where it has none. A list is joined
        by commas, a dictionary is given as JSON, and null leaves the option out.
      - Options that follow from the other options of this module are refused.
    type: dict
    default: {}
  models:
    description:
      - Several models that take turns, instead of O(model_file), O(volume), O(alias), O(mode) and O(server_options).
      - The server runs in router mode with C(--models-max 1). It loads the model that a request names, after the one
        that is awake has finished what it works on and was unloaded. The first is loaded at the start.
      - All use the same O(devices).
    type: list
    elements: dict
    default: []
    suboptions:
      alias:
        description:
          - Name under which the model is asked for.
        type: str
        required: true
      volume:
        description:
          - Docker volume with the model, mounted read-only at C(/models/VOLUME).
        type: str
        required: true
      model_file:
        description:
          - Path of the model in the volume; of a split model, its first file.
        type: str
        required: true
      mode:
        description:
          - What the model does.
        type: str
        choices: [chat, embedding]
        default: chat
      server_options:
        description:
          - As O(server_options), for this model.
        type: dict
        default: {}
  model_file:
    description:
      - Path of the model in the volume; of a split model, its first file. Required unless O(state=absent) or
        O(models) is given.
    type: str
  volume:
    description:
      - Docker volume with the model, mounted read-only at C(/models). Required unless O(state=absent) or O(models) is
        given.
      - It must exist; see M(homelab.inference.model_volume).
    type: str
  alias:
    description:
      - Name under which the server offers the model. By default O(name).
    type: str
  port:
    description:
      - TCP port, the same in the container and on the node. Required unless O(state=absent).
    type: int
  published_address:
    description:
      - Address of the node on which the port is published. V(0.0.0.0) publishes it on all.
      - Docker publishes past most host firewalls. Use O(api_key_file) with any address but loopback.
    type: str
    default: 127.0.0.1
  mode:
    description:
      - What the model does. It decides whether C(--embeddings) is given, and whether the first token or the first
        embedding is waited for.
    type: str
    choices: [chat, embedding]
    default: chat
  api_key_file:
    description:
      - File on the node with one API key per line. It must be owned by root with mode C(0600), and is mounted
        read-only.
      - A changed content replaces the container. To see that without showing it, the container carries a keyed
        digest, whose key is made on first use as C(/etc/homelab-inference/label.key) and never leaves the node.
    type: path
  memory_mib:
    description:
      - Memory limit of the container in MiB; it may not swap. By default there is none.
    type: int
  cpus:
    description:
      - CPU limit of the container. The server uses as many threads, rounded down, unless O(server_options) says
        otherwise.
      - By default there is none.
    type: float
  env:
    description:
      - Environment variables. Anyone who may inspect the container can read them.
    type: dict
    default: {}
  labels:
    description:
      - Further labels of the container.
    type: dict
    default: {}
  unit:
    description:
      - The systemd unit that starts this container, waits for it and starts it again after a crash.
      - With it this module starts and stops the server only through C(systemctl) and waits for the unit's result.
        It never takes the node's start lock itself.
      - Without it this module starts the container and waits for its first answer.
    type: str
  ready_timeout:
    description:
      - Seconds from the start to the first answer. That the server says C(Loading model) until then is normal.
      - Changing it alone does not replace the container. With O(unit), the unit's own timeout counts.
    type: int
    default: 900
  stop_timeout:
    description:
      - Seconds that the server has to end by itself before it is killed.
    type: int
    default: 30
  _progress_file:
    description:
      - File on the node into which this module writes how far it is. The action plugin of this module gives it and
        prints what it says; tasks have no use for it.
    type: path
requirements:
  - Docker SDK for Python 5.0 or newer (the package C(python3-docker) of the distribution)
seealso:
  - module: homelab.inference.model_volume
  - module: homelab.inference.gpu_facts
"""


EXAMPLES = r"""
- name: Serve a model from the CPU
  homelab.inference.llamacpp_container:
    name: llamacpp-embed
    image: ghcr.io/ggml-org/llama.cpp:server-b6795
    volume: nomic-embed
    model_file: nomic-embed-text-v1.5.Q8_0.gguf
    alias: nomic-embed
    mode: embedding
    port: 8081
    cpus: 4
    memory_mib: 2048

- name: Serve a model from two NVIDIA cards, started by its unit
  homelab.inference.llamacpp_container:
    name: llamacpp-code
    image: ghcr.io/ggml-org/llama.cpp:server-cuda-b6795
    backend: cuda
    devices: "{{ ansible_facts['inference_gpus'] }}"
    volume: qwen3-coder-30b
    model_file: Qwen3-Coder-30B-A3B-Instruct-Q6_K.gguf
    alias: qwen3-coder-30b
    port: 8080
    published_address: 0.0.0.0
    api_key_file: /etc/homelab-inference/api-key
    server_options:
      ctx-size: 65536
      parallel: 2
      n-gpu-layers: 99
      tensor-split: [3, 1]
      cache-type-k: q8_0
    unit: llamacpp-code.service
    ready_timeout: 600

- name: Let two models take turns on one card
  homelab.inference.llamacpp_container:
    name: llamacpp-turns
    image: ghcr.io/ggml-org/llama.cpp:server-cuda-b6795
    backend: cuda
    devices: "{{ ansible_facts['inference_gpus'][:1] }}"
    models:
      - alias: qwen3-coder-30b
        volume: qwen3-coder-30b
        model_file: Qwen3-Coder-30B-A3B-Instruct-Q4_K_M.gguf
      - alias: gemma-3-27b
        volume: gemma-3-27b
        model_file: gemma-3-27b-it-Q4_K_M.gguf
        server_options:
          ctx-size: 16384
    port: 8080

- name: Take a server off the node
  homelab.inference.llamacpp_container:
    name: llamacpp-code
    unit: llamacpp-code.service
    state: absent
"""

RETURN = r"""
actions:
  description:
    - What was done, or would be done in check mode. Of C(pull), C(create), C(replace), C(start), C(remove),
      C(restore previous) and C(remove previous).
  returned: success
  type: list
  elements: str
  sample: [pull, replace, start]
container:
  description: The container as it is now.
  returned: when it exists
  type: dict
  contains:
    id:
      description: Its ID.
      type: str
    name:
      description: Its name.
      type: str
    image:
      description: The reference that it was made with.
      type: str
    image_id:
      description: The ID of its image.
      type: str
    status:
      description: What the engine says of it.
      type: str
      sample: running
    started_at:
      description: When it was last started.
      type: str
      sample: "2026-11-21T08:13:17.903806978Z"
url:
  description: Where the server answers, seen from its node.
  returned: O(state=started)
  type: str
  sample: http://127.0.0.1:8080
log:
  description: The last lines of the server's own log, or of its unit's journal.
  returned: when the server could not be started
  type: list
  elements: str
restored:
  description: Whether the previous container is back as it was.
  returned: when a replacement failed
  type: bool
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.homelab.inference.plugins.module_utils.container import ContainerError, Manager, connect
from ansible_collections.homelab.inference.plugins.module_utils.llama_server import LlamaServerError
from ansible_collections.homelab.inference.plugins.module_utils.progress import ProgressFile


def main() -> None:
    """Read the arguments, let the manager work, say what it did."""
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["started", "present", "absent"], "default": "started"},
            "image": {"type": "str"},
            "pull": {"type": "str", "choices": ["missing", "always", "never"], "default": "missing"},
            "backend": {
                "type": "str",
                "choices": ["cpu", "cuda", "rocm", "vulkan", "sycl", "emulated"],
                "default": "cpu",
            },
            "devices": {"type": "list", "elements": "dict", "default": []},
            "server_options": {"type": "dict", "default": {}},
            "models": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "alias": {"type": "str", "required": True},
                    "volume": {"type": "str", "required": True},
                    "model_file": {"type": "str", "required": True},
                    "mode": {"type": "str", "choices": ["chat", "embedding"], "default": "chat"},
                    "server_options": {"type": "dict", "default": {}},
                },
            },
            "model_file": {"type": "str"},
            "volume": {"type": "str"},
            "alias": {"type": "str"},
            "port": {"type": "int"},
            "published_address": {"type": "str", "default": "127.0.0.1"},
            "mode": {"type": "str", "choices": ["chat", "embedding"], "default": "chat"},
            "api_key_file": {"type": "path", "no_log": False},
            "memory_mib": {"type": "int"},
            "cpus": {"type": "float"},
            "env": {"type": "dict", "default": {}},
            "labels": {"type": "dict", "default": {}},
            "unit": {"type": "str"},
            "ready_timeout": {"type": "int", "default": 900},
            "stop_timeout": {"type": "int", "default": 30},
            "_progress_file": {"type": "path"},
        },
        required_if=[("state", value, ["image", "port"]) for value in ("started", "present")],
        required_together=[("model_file", "volume")],
        supports_check_mode=True,
    )
    instance: dict[str, Any] = {**module.params, "alias": module.params["alias"] or module.params["name"]}
    try:
        try:
            client = connect()
        except ContainerError as error:
            if not module.check_mode:
                raise
            # On a fresh node the engine comes with an earlier task, which check mode did not do.
            client = None
            module.warn(f"{error} Check mode goes on as if this node had no container.")
        with ProgressFile(module.params["_progress_file"]) as progress:
            manager = Manager(client, instance, module.check_mode, progress.report)
            result = manager.run()
    except ContainerError as error:
        more = {"log": error.log} if error.log else {}
        if error.restored is not None:
            more["restored"] = error.restored
        module.fail_json(msg=str(error), **more)
    except LlamaServerError as error:
        module.fail_json(msg=str(error))
    for warning in manager.warnings:
        module.warn(warning)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
