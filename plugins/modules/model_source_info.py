#!/usr/bin/python
# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
---
module: model_source_info
short_description: Resolve declared model sources to exact files
version_added: 0.1.0
description:
  - Finds out which files a declared source means, with commit, sizes, digests and the model's shape.
  - Fetches no weights. The shape is read from the header by range requests, at most 16 MiB for a model.
  - A source that cannot be resolved never fails the run. All of them are named in RV(problems).
  - Runs on the controller. Nothing is written.
author:
  - homelab.inference contributors (!UNKNOWN)
extends_documentation_fragment:
  - homelab.inference.attributes.info
options:
  sources:
    description: The models to resolve. A model may be listed several times, with other quantisations.
    type: list
    elements: dict
    required: true
    suboptions:
      model:
        description: Name of the model in the declaration.
        type: str
        required: true
      source:
        description: Where it comes from, one of O(sources[].source.hf), O(sources[].source.url),
          O(sources[].source.file) and O(sources[].source.library).
        type: dict
        required: true
        suboptions:
          hf:
            description: A repository of the Hugging Face Hub as C(owner/name).
            type: str
          quant:
            description:
              - Quantisations of the repository in order of preference, as its file names spell them.
                The first that it has is taken.
              - Without it V(Q4_K_M), else the smallest at or above 4 bits that the repository has.
            type: list
            elements: str
          file:
            description:
              - With O(sources[].source.hf) the name of a file in the repository, instead of a quantisation.
              - Alone the path of a file on the controller.
              - Of a split set any one of its shards stands for all.
            type: str
          mmproj:
            description:
              - Multimodal projector of the repository.
              - V(none), V(auto) for its best (F16, else BF16, F32, Q8_0), or a file's name.
            type: str
            default: none
          revision:
            description: Branch, tag or commit of the repository.
            type: str
            default: main
          url:
            description: Address of a GGUF file.
            type: str
          sha256:
            description: Digest of the file at O(sources[].source.url) or O(sources[].source.file).
            type: str
          library:
            description:
              - Name of a file in a library of the nodes.
              - It is handed through, see M(homelab.inference.gguf_info).
            type: str
  hf_endpoint:
    description: Address of the hub or of a mirror of it. The environment variable E(HF_ENDPOINT) stands in for it.
    type: str
    default: https://huggingface.co
  hf_token:
    description:
      - Token for private and gated repositories. The environment variable E(HF_TOKEN) stands in for it.
      - It is sent to O(hf_endpoint) alone, never to where that redirects.
    type: str
  timeout:
    description: Seconds to wait for each answer. A host that does not answer is asked once.
    type: int
    default: 30
seealso:
  - module: homelab.inference.gguf_info
"""

EXAMPLES = r"""
- name: Resolve the declared models
  homelab.inference.model_source_info:
    sources:
      - model: gemma-3-27b
        source: {hf: ggml-org/gemma-3-27b-it-GGUF, quant: [Q4_K_M, Q8_0], mmproj: auto}
      - model: mine
        source: {file: ~/models/mine.gguf}
  delegate_to: localhost
  register: resolved

- name: Go on only when all are there
  ansible.builtin.assert:
    that: resolved.problems | length == 0
    fail_msg: "{{ resolved.problems | map(attribute='error') | join(' ') }}"
"""

RETURN = r"""
models:
  description: The sources that could be resolved, in the order of O(sources).
  returned: always
  type: list
  elements: dict
  contains:
    model:
      description: Name of the model in the declaration.
      type: str
      sample: gemma-3-27b
    library:
      description: Name of the file in a library where the source is one. There are then no files and no shape.
      type: str
    repo:
      description: The repository where the source is one.
      type: str
      sample: Qwen/Qwen3-0.6B-GGUF
    commit:
      description: The commit that the revision means now.
      type: str
    quant:
      description: The quantisation, by the file's name in a repository, else by its header.
      type: str
      sample: Q8_0
    files:
      description:
        - The model's files in order. Each has C(name), C(size) in bytes, C(sha256), and C(url) or C(controller_path).
        - C(sha256) is V(null) where the server does not tell it. Files of O(sources[].source.url) have an C(etag).
      type: list
      elements: dict
      sample:
        - name: Qwen3-0.6B-Q8_0.gguf
          url: https://huggingface.co/Qwen/Qwen3-0.6B-GGUF/resolve/main/Qwen3-0.6B-Q8_0.gguf
          size: 639446688
          sha256: 9465e63a22add5354d9bb4b99e90117043c7124007664907259bd16d043bb031
    mmproj:
      description: The multimodal projector as one of RV(models[].files), with its C(shape).
      type: dict
    shape:
      description: What planning needs to know, as in RV(homelab.inference.gguf_info#module:files[].shape).
      type: dict
problems:
  description: The sources that cannot be resolved, each with one sentence.
  returned: always
  type: list
  elements: dict
  contains:
    model:
      description: Name of the model in the declaration.
      type: str
      sample: gemma-3-27b
    error:
      description: What is wrong and what to do.
      type: str
      sample: >-
        Cannot resolve the model gemma-3-27b: the repository ggml-org/gemma-3-27b-it-GGUF has no Q6_K.
        It has F16, Q4_K_M, Q8_0.
"""

from ansible.module_utils.basic import AnsibleModule, env_fallback
from ansible_collections.homelab.inference.plugins.module_utils import model_source


def main() -> None:
    source = {
        "hf": {"type": "str"},
        "quant": {"type": "list", "elements": "str"},
        "file": {"type": "str"},
        "mmproj": {"type": "str", "default": "none"},
        "revision": {"type": "str", "default": "main"},
        "url": {"type": "str"},
        "sha256": {"type": "str"},
        "library": {"type": "str"},
    }
    module = AnsibleModule(
        argument_spec={
            "sources": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "model": {"type": "str", "required": True},
                    "source": {
                        "type": "dict",
                        "required": True,
                        "options": source,
                        "required_one_of": [("hf", "url", "file", "library")],
                        "mutually_exclusive": [("hf", "url", "library"), ("file", "url", "library")],
                    },
                },
            },
            "hf_endpoint": {
                "type": "str",
                "default": model_source.ENDPOINT,
                "fallback": (env_fallback, ["HF_ENDPOINT"]),
            },
            "hf_token": {"type": "str", "no_log": True, "fallback": (env_fallback, ["HF_TOKEN"])},
            "timeout": {"type": "int", "default": 30},
        },
        supports_check_mode=True,
    )
    options = module.params
    web = model_source.Web(options["hf_endpoint"], options["hf_token"], options["timeout"])
    models, problems = model_source.resolve_all(options["sources"], web)
    module.exit_json(changed=False, models=models, problems=problems)


if __name__ == "__main__":
    main()
