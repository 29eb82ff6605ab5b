# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json

import pytest
import yaml
from ansible.module_utils.testing import patch_module_args
from ansible_collections.homelab.inference.plugins.modules import gguf_info
from ansible_collections.homelab.inference.tests.unit.plugins.module_utils import gguf_files as files


def run(capsys, **options):
    with patch_module_args(options), pytest.raises(SystemExit) as ended:
        gguf_info.main()
    return ended.value.code, json.loads(capsys.readouterr().out)


def state(folder):
    return {path: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in [folder, *folder.rglob("*")]}


@pytest.mark.parametrize("check", [False, True])
def test_home_is_that_of_the_user_and_nothing_is_written(tmp_path, monkeypatch, capsys, check):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    files.write_llama(tmp_path / "models" / "tiny.gguf")
    before = state(tmp_path)
    code, result = run(
        capsys, libraries=["~/models", "~/none"], paths=["~/other.gguf"], sha256=True, _ansible_check_mode=check
    )
    assert (code, result["changed"]) == (0, False)
    assert [(entry["library"], entry["path"]) for entry in result["files"]] == [(f"{tmp_path}/models", "tiny.gguf")]
    assert [problem["path"] for problem in result["problems"]] == [f"{tmp_path}/none", f"{tmp_path}/other.gguf"]
    assert state(tmp_path) == before


def test_nothing_to_look_at_is_nothing(capsys):
    assert run(capsys)[1]["files"] == []


def test_the_documented_result_is_the_result(tmp_path, capsys):
    files.write_llama(tmp_path / "tiny.gguf")
    (entry,) = run(capsys, libraries=[str(tmp_path)])[1]["files"]
    documented = yaml.safe_load(gguf_info.RETURN)["files"]["contains"]
    assert set(documented) == set(entry)
    assert set(documented["shape"]["contains"]) == set(entry["shape"])
