# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
import socket

import pytest
import yaml
from ansible.module_utils.testing import patch_module_args
from ansible_collections.homelab.inference.plugins.modules import model_source_info
from ansible_collections.homelab.inference.tests.unit.plugins.module_utils import gguf_files as files


def run(capsys, **options):
    with patch_module_args(options), pytest.raises(SystemExit) as ended:
        model_source_info.main()
    return ended.value.code, json.loads(capsys.readouterr().out)


def test_files_and_problems_come_together(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = files.write_llama(tmp_path / "mine.gguf")
    with socket.socket() as unused:
        # Bound and not listening: nobody else can answer here.
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_owner")
        sources = [
            {"model": "mine", "source": {"file": "~/mine.gguf"}},
            {"model": "chat", "source": {"hf": "org/repo", "quant": "Q4_K_M"}},
        ]
        code, result = run(capsys, sources=sources, _ansible_check_mode=True)
    assert (code, result["changed"]) == (0, False)
    (model,) = result["models"]
    assert model["files"][0]["controller_path"] == str(path)
    assert set(model) == set(yaml.safe_load(model_source_info.RETURN)["models"]["contains"])
    (problem,) = result["problems"]
    assert problem["error"].startswith(f"Cannot resolve the model chat: {endpoint} cannot be reached, ")
    assert "hf_secret_of_the_owner" not in json.dumps(result)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "one of the following is required: hf, url, file, library"),
        ({"hf": "a/b", "url": "http://c"}, "mutually exclusive"),
        ({"file": "a", "library": "b"}, "mutually exclusive"),
    ],
)
def test_a_source_is_one_thing(capsys, source, message):
    code, result = run(capsys, sources=[{"model": "chat", "source": source}])
    assert code == 1
    assert message in result["msg"]
