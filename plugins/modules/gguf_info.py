#!/usr/bin/python
# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
---
module: gguf_info
short_description: Index GGUF model files and read their shape
version_added: 0.1.0
description:
  - Finds GGUF models where they lie and reads what their headers say of them.
    Weights are never read, unless O(sha256) asks for digests.
  - Knows split sets (C(NAME-00001-of-00003.gguf)), the cache of Hugging Face and the directories of LM Studio.
  - A file that cannot be used never fails the run. It is named in RV(problems).
  - Nothing is written.
author:
  - homelab.inference contributors (!UNKNOWN)
extends_documentation_fragment:
  - homelab.inference.attributes.info
options:
  libraries:
    description:
      - Directories to index with everything below them. Hidden directories in them are passed over.
      - A leading C(~) is the home of the user that the task runs as.
    type: list
    elements: path
    default: []
  paths:
    description: Single files. Of a split set any one of its shards stands for all.
    type: list
    elements: path
    default: []
  sha256:
    description:
      - Whether to compute the SHA-256 of each file that has no known one. This reads every byte of every model.
      - Large files in the cache of Hugging Face have a known one, it is their name.
    type: bool
    default: false
seealso:
  - module: homelab.inference.model_source_info
"""

EXAMPLES = r"""
- name: Index what lies on the node already
  homelab.inference.gguf_info:
    libraries:
      - /srv/models
      - ~/.cache/huggingface
  register: library

- name: Show what cannot be used
  ansible.builtin.debug:
    msg: "{{ library.problems | map(attribute='error') }}"

- name: Read one model's shape and digest
  homelab.inference.gguf_info:
    paths: [/srv/models/gpt-oss-120b-mxfp4-00001-of-00003.gguf]
    sha256: true
"""

RETURN = r"""
files:
  description:
    - One entry for each model, a split set being one.
    - In the order of O(libraries) and then of O(paths), and inside a library by path.
  returned: always
  type: list
  elements: dict
  contains:
    library:
      description: The directory of O(libraries), V(null) for one of O(paths).
      type: str
      sample: /srv/models
    path:
      description: Path of the file, or of its first shard, relative to RV(files[].library) or as given.
      type: str
      sample: gpt-oss-120b-mxfp4-00001-of-00003.gguf
    name:
      description: Name of the file, or of its first shard.
      type: str
      sample: gpt-oss-120b-mxfp4-00001-of-00003.gguf
    size:
      description: Bytes of all shards.
      type: int
      sample: 63387346464
    mtime:
      description: When the newest shard was modified, in seconds since 1970.
      type: int
      sample: 1754400000
    sha256:
      description: Digest of the file where it is known. Always V(null) for a split set, whose shards have their own.
      type: str
    shards:
      description:
        - The files of a split set in order, each with C(name), C(path), C(size), C(mtime) and C(sha256).
        - Empty for a single file.
      type: list
      elements: dict
    mmproj:
      description: Whether it is a multimodal projector and no model by itself.
      type: bool
      sample: false
    repo:
      description: The repository it came from where the directory tells it.
      type: str
      sample: ggml-org/gpt-oss-120b-GGUF
    commit:
      description: The commit of that repository where the directory tells it.
      type: str
    shape:
      description:
        - What planning needs to know. Keys that the model does not have are V(null).
        - Sizes are in bytes, of the tensors without padding.
      type: dict
      contains:
        architecture:
          description: As llama.cpp calls it.
          type: str
          sample: qwen3moe
        type:
          description: V(model), V(adapter), V(mmproj) or V(imatrix) where the file says so.
          type: str
          sample: model
        name:
          description: Name that the model gives itself.
          type: str
          sample: Qwen3 Coder 30B A3B Instruct
        size_label:
          description: Size that the model gives itself.
          type: str
          sample: 30B-A3B
        quant:
          description: Kind of quantisation, by the header and not by the file's name.
          type: str
          sample: Q4_K_M
        parameters:
          description: Number of weights.
          type: int
          sample: 30532122624
        context_length:
          description: Tokens the model was trained on.
          type: int
          sample: 262144
        block_count:
          description: Layers.
          type: int
          sample: 48
        embedding_length:
          description: Width of a token's vector.
          type: int
          sample: 2048
        head_count:
          description: Attention heads, a list where the layers differ.
          type: raw
          sample: 32
        head_count_kv:
          description: Heads that keep keys and values, a list where the layers differ.
          type: raw
          sample: 4
        key_length:
          description: Width of one head's key.
          type: int
          sample: 128
        value_length:
          description: Width of one head's value.
          type: int
          sample: 128
        expert_count:
          description: Experts in a layer, 0 in a dense model.
          type: int
          sample: 128
        expert_used_count:
          description: Experts used for one token.
          type: int
          sample: 8
        pooling:
          description: How an embedding model pools, V(null) for others.
          type: str
          sample: mean
        tokenizer:
          description: Kind of tokenizer.
          type: str
          sample: gpt2
        vocab_size:
          description: Number of tokens.
          type: int
          sample: 151936
        tied_output:
          description: Whether the output uses the input's embedding, which then lies in two places.
          type: bool
          sample: false
        tensor_count:
          description: Number of tensors.
          type: int
          sample: 579
        weights_bytes:
          description: All tensors.
          type: int
          sample: 18550000000
        input_bytes:
          description: Token and position embeddings.
          type: int
          sample: 175000000
        output_bytes:
          description: Output matrix and norm.
          type: int
          sample: 255000000
        other_bytes:
          description: Tensors that belong to no layer, input or output.
          type: int
          sample: 0
        block_bytes:
          description: Each layer's tensors.
          type: list
          elements: int
          sample: [378000000]
        expert_bytes:
          description: The experts' part of each layer.
          type: list
          elements: int
          sample: [362000000]
        hparams:
          description: The architecture's other whole numbers and switches, by the key without its prefix.
          type: dict
          sample: {attention.sliding_window: 1024, feed_forward_length: 6144}
problems:
  description: Files and directories that cannot be used, each with one sentence.
  returned: always
  type: list
  elements: dict
  contains:
    path:
      description: The file or directory.
      type: str
      sample: /srv/models/half.gguf
    error:
      description: What is wrong with it and what to do.
      type: str
      sample: >-
        Cannot use /srv/models/half.gguf: it has 1000 bytes of the 436000 that its header promises.
        Fetch the rest of it.
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.homelab.inference.plugins.module_utils.model_library import Index


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "libraries": {"type": "list", "elements": "path", "default": []},
            "paths": {"type": "list", "elements": "path", "default": []},
            "sha256": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    index = Index(module.params["sha256"])
    for library in module.params["libraries"]:
        index.add_library(library)
    index.add_files(module.params["paths"])
    module.exit_json(changed=False, files=index.files, problems=index.problems)


if __name__ == "__main__":
    main()
