#!/usr/bin/python
# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Writes the configuration file of a LiteLLM proxy."""

from __future__ import annotations

DOCUMENTATION = r"""
module: litellm_config
short_description: Write the configuration file of a LiteLLM proxy
version_added: 0.1.0
author: homelab.inference contributors (!UNKNOWN)
description:
  - Writes the model groups, fallbacks, aliases and router settings of a LiteLLM proxy to its configuration file.
  - Checks the whole input first and reports all problems at once. Nothing is written when there is one.
  - The file holds no secret. It names environment variables (C(os.environ/NAME)), and LiteLLM reads the keys there.
  - The file is written as JSON, which is YAML too, so that the module needs nothing beyond Python's standard library.
  - The same input gives the same bytes, in whatever order it is written. LiteLLM reads the file only when it starts.
extends_documentation_fragment:
  - homelab.inference.attributes
  - ansible.builtin.files
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
    details: Shows the text of the file, which holds no secret.
  idempotent:
    support: full
options:
  path:
    description: The file to write. Its directory has to be there.
    type: path
    required: true
  deployments:
    description: The model servers behind the proxy. Those with the same O(deployments[].name) share its requests.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: The model group, which is the name that clients ask for.
        type: str
        required: true
      engine:
        description:
          - What runs there. It decides the form that LiteLLM needs.
          - V(llamacpp) becomes C(openai/<model>) with an address that ends in C(/v1).
          - V(ollama) becomes C(ollama_chat/<model>), for embeddings C(ollama/<model>), with an address without C(/v1).
        type: str
        choices: [llamacpp, ollama]
        default: llamacpp
      model:
        description: The name under which the server knows the model.
        type: str
        required: true
      api_base:
        description: Address of the server, such as V(http://10.0.10.20:8080). A C(/v1) at its end makes no difference.
        type: str
        required: true
      mode:
        description: What the model is for. All deployments of a group have the same.
        type: str
        choices: [chat, embedding]
        default: chat
      api_key_env:
        description: Environment variable of the proxy that holds the server's key, where the server asks for one.
        type: str
      id:
        description: Name of this deployment, unique in the file.
        type: str
        required: true
  fallbacks:
    description:
      - For a model group, the groups that answer in its place when it fails, in that order.
      - They have the same mode and must not lead back to it.
    type: dict
    default: {}
  aliases:
    description: Further names, each for one model group, for example a category of work.
    type: dict
    default: {}
  num_retries:
    description: How often a failed request is tried again, where possible on another deployment of the group.
    type: int
    default: 2
  request_timeout:
    description: How long one request may take, in seconds.
    type: int
    default: 600
  cooldown_time:
    description:
      - How long a deployment gets no requests after one that failed, in seconds.
      - LiteLLM applies it where a group has more than one deployment.
    type: int
    default: 5
  health_check_interval:
    description:
      - Seconds between two checks that the proxy makes of every deployment by itself, each with a real request.
      - Deployments that fail get no requests.
      - V(0) means no such checks. They keep models awake that would otherwise be unloaded.
      - Has to be smaller than O(cooldown_time).
    type: int
    default: 0
  master_key_env:
    description:
      - Environment variable of the proxy that holds its master key.
      - Where that is empty, the proxy is open to all.
    type: str
    default: LITELLM_MASTER_KEY
  validate:
    description:
      - Command that checks the new file before it is put in place, with C(%s) for its path.
      - LiteLLM 1.106 has C(litellm --config %s --validate_config), which takes about 7 seconds.
    type: str
  backup:
    description: Keep a copy of the file that is replaced, with the time in its name.
    type: bool
    default: false
seealso:
  - name: LiteLLM proxy settings
    description: All keys of the file.
    link: https://docs.litellm.ai/docs/proxy/config_settings
"""

EXAMPLES = r"""
- name: Two servers for chat, one for code that chat stands in for, and one for embeddings
  homelab.inference.litellm_config:
    path: /etc/homelab-inference/litellm/config.yaml
    mode: "0644"
    deployments:
      - {id: chat-1, name: chat, model: chat, api_base: "http://10.0.10.20:8080", api_key_env: LLAMACPP_API_KEY}
      - {id: chat-2, name: chat, model: chat, api_base: "http://10.0.10.30:8080", api_key_env: LLAMACPP_API_KEY}
      - {id: code, name: code, model: code, api_base: "http://10.0.10.20:8081", api_key_env: LLAMACPP_API_KEY}
      - {id: embed, name: embed, model: embed, api_base: "http://10.0.10.30:8081", mode: embedding}
    fallbacks:
      code: [chat]
    aliases:
      reason: chat

- name: A model served by Ollama, checked by LiteLLM before the file is replaced
  homelab.inference.litellm_config:
    path: /etc/litellm/config.yaml
    validate: litellm --config %s --validate_config
    backup: true
    deployments:
      - {name: local/chat, id: local-chat, engine: ollama, model: "qwen2.5:32b", api_base: "http://127.0.0.1:11434"}
"""

RETURN = r"""
path:
  description: The file.
  type: str
  returned: always
  sample: /etc/homelab-inference/litellm/config.yaml
models:
  description: The names that clients can ask for, model groups and aliases, sorted.
  type: list
  elements: str
  returned: always
  sample: [chat, code, embed, reason]
backup_file:
  description: The copy of the replaced file.
  type: str
  returned: when O(backup=true) and a file was replaced
  sample: /etc/homelab-inference/litellm/config.yaml.1817.2026-11-21@08:00:00~
problems:
  description: Everything that is wrong with the input.
  type: list
  elements: str
  returned: when there is something wrong with it
  sample: ["Fallbacks go round in a circle: chat -> code -> chat."]
"""

import os
import tempfile
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.common.text.converters import to_native
from ansible_collections.homelab.inference.plugins.module_utils.litellm import config_text, find_problems, model_names

DEPLOYMENT = {
    "name": {"type": "str", "required": True},
    "engine": {"type": "str", "choices": ["llamacpp", "ollama"], "default": "llamacpp"},
    "model": {"type": "str", "required": True},
    "api_base": {"type": "str", "required": True},
    "mode": {"type": "str", "choices": ["chat", "embedding"], "default": "chat"},
    "api_key_env": {"type": "str", "no_log": False},
    "id": {"type": "str", "required": True},
}


def write(module: AnsibleModule, path: str, text: str) -> None:
    """Put the text in place in one step, after the checker has seen it."""
    descriptor, temporary = tempfile.mkstemp(dir=module.tmpdir)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(text)
    validate = module.params["validate"]
    if validate:
        code, out, err = module.run_command(validate.replace("%s", temporary))
        if code != 0:
            module.fail_json(
                msg=f"Checking the new {path} failed: {to_native(err or out).strip()}. The file there is unchanged.",
                rc=code,
            )
    module.atomic_move(temporary, path)


def main() -> None:
    """Check the input, compare the text with the file, write what differs."""
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "deployments": {"type": "list", "elements": "dict", "required": True, "options": DEPLOYMENT},
            "fallbacks": {"type": "dict", "default": {}},
            "aliases": {"type": "dict", "default": {}},
            "num_retries": {"type": "int", "default": 2},
            "request_timeout": {"type": "int", "default": 600},
            "cooldown_time": {"type": "int", "default": 5},
            "health_check_interval": {"type": "int", "default": 0},
            "master_key_env": {"type": "str", "default": "LITELLM_MASTER_KEY", "no_log": False},
            "validate": {"type": "str"},
            "backup": {"type": "bool", "default": False},
        },
        add_file_common_args=True,
        supports_check_mode=True,
    )
    path = module.params["path"]
    problems = find_problems(module.params)
    if module.params["validate"] and "%s" not in module.params["validate"]:
        problems.append("validate has no %s for the path of the new file. Add it to the command.")
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems)
        module.fail_json(msg=f"The LiteLLM configuration {path} cannot be made:\n{listed}", problems=problems)

    text = config_text(module.params)
    result = {"changed": False, "path": path, "models": model_names(module.params)}
    try:
        before = Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        before = None
    except OSError as error:
        module.fail_json(msg=f"Reading {path} failed: {error.strerror}. Give the path of a file.")
    if before != text:
        result["changed"] = True
        result["diff"] = {"before": before or "", "after": text, "before_header": path, "after_header": path}
        if not module.check_mode:
            if not Path(path).parent.is_dir():
                module.fail_json(msg=f"Writing {path} failed: its directory is not there. Make the directory first.")
            if module.params["backup"] and before is not None:
                result["backup_file"] = module.backup_local(path)
            write(module, path, text)
    if Path(path).exists():
        arguments = module.load_file_common_arguments(module.params)
        result["changed"] = module.set_fs_attributes_if_different(arguments, result["changed"])
    module.exit_json(**result)


if __name__ == "__main__":
    main()
