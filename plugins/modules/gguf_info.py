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
  calibrate:
    description:
      - Whether to ask the server in O(image) how much memory each model would take.
      - It lays everything out and is stopped before it loads anything, without a network. That takes about two seconds
        and 200 MiB for each model, however large it is. Of a file that is not there in full, the header will do.
      - In a model's entry of M(homelab.inference.vram_plan)'s O(homelab.inference.vram_plan#module:resolved), as
        C(calibration), it stands in for the planner's own rules.
    type: bool
    default: false
  image:
    description: Image with llama-server, which is there already. Required with O(calibrate).
    type: str
  server_options:
    description: Long options of llama-server without dashes, as it will run with them.
    type: dict
    default: {}
  device_count:
    description:
      - How many devices the layers are spread over. C(ggml-rpc-server) of the image stands in for each.
      - With 0 the processor has everything.
    type: int
    default: 0
  mode:
    description: What the server is for.
    type: str
    choices: [chat, embedding]
    default: chat
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

- name: Let the engine itself say what it would take
  homelab.inference.gguf_info:
    paths: [/srv/models/qwen3-8b-q4_k_m.gguf]
    calibrate: true
    image: ghcr.io/ggml-org/llama.cpp:server
    server_options: {ctx-size: 32768, parallel: 2}
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
        ffn_bytes:
          description: The dense feed-forward part of each layer.
          type: list
          elements: int
          sample: [0]
        embedding_bytes:
          description: The token table, which an output that is tied to it needs a second time on a device.
          type: int
          sample: 175000000
        repack_bytes:
          description:
            - Of the tensors that a processor may keep in another order, the bytes by type of tensor and by part.
            - Parts are C(blocks), C(experts) and C(feed_forward), each per layer, and C(output), C(embedding) and
              C(other).
          type: dict
          sample: {Q4_K: {blocks: [9437184], experts: [301989888]}}
        hparams:
          description: The architecture's other whole numbers and switches, by the key without its prefix.
          type: dict
          sample: {attention.sliding_window: 1024, feed_forward_length: 6144}
calibrations:
  description: What the engine said, one entry for each model that it could be asked about.
  returned: always
  type: list
  elements: dict
  contains:
    path:
      description: As in RV(files).
      type: str
      sample: /srv/models/qwen3-8b-q4_k_m.gguf
    image:
      description: Digest of the image that was asked.
      type: str
      sample: sha256:17afbf101ae0
    shape:
      description: Digest of everything in the model's shape that the buffers depend on.
      type: str
    class:
      description: In words, what must be alike for another server's buffers to follow from these.
      type: str
      sample: 0 devices, 33 host, experts 0, slots 2, flash True, kv f16 f16
    points:
      description: Size of a batch, tokens of one cache, and the buffers by place and kind in bytes.
      type: list
      elements: dict
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

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.homelab.inference.plugins.module_utils import dry_pass, gguf
from ansible_collections.homelab.inference.plugins.module_utils.llama_log import LlamaLogError
from ansible_collections.homelab.inference.plugins.module_utils.memory.calibration import calibration, variants
from ansible_collections.homelab.inference.plugins.module_utils.model_library import Index

SECONDS = 300  # that all answers about one model may take


class _Unasked(Exception):
    """The engine gave no answer about a model."""


def _image(module: AnsibleModule) -> str:
    """The image's digest."""
    name = module.params["image"]
    rc, out, err = module.run_command(["docker", "image", "inspect", "--format", "{{.Id}}", name])
    if rc:
        module.fail_json(
            msg=f"Cannot calibrate with image {name}: {err.strip().splitlines()[-1:] or rc}. Pull it onto this node."
        )
    return str(out.strip())


def _whole(path: Path, stack: ExitStack) -> tuple[gguf.Header, Path]:
    """A file's header, and the file itself; one with a hole in place of its tensors where they are not there."""
    with path.open("rb", buffering=0) as stream:
        header = gguf.read_header(stream)
        stream.seek(0, 2)
        if stream.tell() >= header.file_bytes:
            return header, path.resolve()
        copy = Path(stack.enter_context(tempfile.TemporaryDirectory())) / path.name
        stream.seek(0)
        with copy.open("wb") as target:
            target.write(stream.read(header.header_bytes))
            target.truncate(header.file_bytes)
    return header, copy


def _ask(module: AnsibleModule, path: Path, image: str) -> dict[str, Any]:
    """What the engine says of one model."""
    options, count = module.params["server_options"], module.params["device_count"]
    with ExitStack() as stack:
        try:
            files = [_whole(one, stack) for one in gguf.shard_paths(path)]
            shape = gguf.shape([header for header, _file in files])
        except (gguf.GGUFError, OSError) as error:
            raise _Unasked(f"Cannot use {path}: {error}.") from error
        mounts = {str(file): one.name for (_header, file), one in zip(files, gguf.shard_paths(path))}
        runs = variants(shape, options)
        first = gguf.shard_names(path.name)[0]
        lines = [dry_pass.case(number, first, given, count, module.params["mode"]) for number, given in enumerate(runs)]
        command = ["timeout", str(SECONDS), *dry_pass.command(module.params["image"], mounts)]
        rc, out, err = module.run_command(command, data="\n".join(lines), errors="replace")
    texts = dry_pass.texts(out)
    if rc or len(texts) != len(runs):
        raise _Unasked(f"Cannot ask {module.params['image']} about {path}: {err.strip()[-300:] or rc}. Try it by hand.")
    try:
        answers = [(given, dry_pass.buffers(text, count)) for given, text in zip(runs, texts)]
    except LlamaLogError as error:
        raise _Unasked(f"Cannot ask {module.params['image']} about {path}: {error}") from error
    if module.params["mode"] == "embedding":
        options, answers = {**options, "embedding": True}, [({**given, "embedding": True}, a) for given, a in answers]
    devices = [{"id": f"gpu{index}", "vendor": "emulated", "memory_mib": 1} for index in range(count)]
    return {"path": str(path), **calibration(image, shape, options, devices, answers)}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "libraries": {"type": "list", "elements": "path", "default": []},
            "paths": {"type": "list", "elements": "path", "default": []},
            "sha256": {"type": "bool", "default": False},
            "calibrate": {"type": "bool", "default": False},
            "image": {"type": "str"},
            "server_options": {"type": "dict", "default": {}},
            "device_count": {"type": "int", "default": 0},
            "mode": {"type": "str", "choices": ["chat", "embedding"], "default": "chat"},
        },
        required_if=[("calibrate", True, ["image"])],
        supports_check_mode=True,
    )
    index = Index(module.params["sha256"])
    for library in module.params["libraries"]:
        index.add_library(library)
    index.add_files(module.params["paths"])
    calibrations = []
    if module.params["calibrate"]:
        image = _image(module)
        known = [Path(entry["library"] or "") / entry["path"] for entry in index.files if not entry["mmproj"]]
        named = [Path(path) for path in module.params["paths"]]
        for path in dict.fromkeys(known + [path for path in named if path not in known]):
            try:
                calibrations.append(_ask(module, path, image))
            except _Unasked as error:
                index.problems.append({"path": str(path), "error": str(error)})
    module.exit_json(changed=False, files=index.files, calibrations=calibrations, problems=index.problems)


if __name__ == "__main__":
    main()
