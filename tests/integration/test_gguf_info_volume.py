# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The header of a model in a Docker volume: the volume's own folder is a library like any other."""

from __future__ import annotations

import secrets
import subprocess

import docker
import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.homelab.inference.plugins.modules import gguf_info
from ansible_collections.homelab.inference.tests.unit.plugins.module_utils import gguf_files as files


@pytest.fixture
def volume():
    engine = docker.from_env(version="auto")
    made = engine.volumes.create(f"ggufinfo-{secrets.token_hex(4)}")
    yield made
    made.remove()


def test_a_volume_is_a_library(volume, tmp_path, monkeypatch) -> None:
    files.write_llama(tmp_path / "chat.gguf", layers=4, shards=3)
    files.write_projector(tmp_path / "mmproj-chat.gguf")
    # Through the engine, as model_volume writes: what comes to lie there is the engine's business.
    copy = ["docker", "run", "--rm", "--network=none", "--entrypoint=sh", f"--volume={volume.name}:/models"]
    copy += [f"--volume={tmp_path}:/from:ro", "homelab-inference/llama.cpp:dev", "-c", "cp /from/* /models"]
    subprocess.run(copy, check=True, capture_output=True)
    found = {}
    monkeypatch.setattr(gguf_info.AnsibleModule, "exit_json", lambda _module, **result: found.update(result))
    with patch_module_args({"libraries": [volume.attrs["Mountpoint"]]}):
        gguf_info.main()
    assert not found["problems"]
    shapes = {entry["name"]: entry for entry in found["files"]}
    assert sorted(shapes) == ["chat-00001-of-00003.gguf", "mmproj-chat.gguf"]
    assert shapes["mmproj-chat.gguf"]["mmproj"]
    assert len(shapes["chat-00001-of-00003.gguf"]["shards"]) == 3
    assert shapes["chat-00001-of-00003.gguf"]["shape"]["block_count"] == 4
