# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the module reports of endpoints that do not answer."""

from __future__ import annotations

import json

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.homelab.inference.plugins.modules import health_probe

SILENT = "http://127.0.0.1:1"


def run(capsys, endpoints: list) -> dict:
    with patch_module_args({"endpoints": endpoints}), pytest.raises(SystemExit) as exit_:
        health_probe.main()
    result = json.loads(capsys.readouterr().out)
    return {**result, "rc": exit_.value.code}


def test_silent_endpoints_are_reported_and_fail_nothing(capsys) -> None:
    result = run(
        capsys,
        [
            {"name": "gateway", "url": SILENT, "tier": "GATEWAY", "kind": "litellm"},
            {"name": "chat", "url": SILENT, "kind": "llamacpp", "api_key": "s3cret-of-the-lab"},
        ],
    )
    assert result["rc"] == 0
    assert not result["changed"]
    assert [(entry["name"], entry["state"]) for entry in result["results"]] == [("gateway", "DOWN"), ("chat", "DOWN")]
    assert result["tiers"] == {"GATEWAY": "DOWN", "REMOTE": "DOWN"}
    assert result["overall"] == "DOWN"
    assert "Overall: DOWN" in result["table"]
    assert "s3cret" not in json.dumps(result)
