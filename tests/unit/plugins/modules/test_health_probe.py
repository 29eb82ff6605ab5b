# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the module reports of endpoints that do not answer."""

from __future__ import annotations

import http.server
import json
import threading

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.homelab.inference.plugins.modules import health_probe

SILENT = "http://127.0.0.1:1"


def run(capsys, endpoints: list, **more) -> dict:
    with patch_module_args({"endpoints": endpoints, **more}), pytest.raises(SystemExit) as exit_:
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


class Keyed(http.server.BaseHTTPRequestHandler):
    """A server that is DEGRADED for whoever comes without the right key."""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        right = self.headers.get("Authorization") == "Bearer right"
        self.send_response(200 if right or self.path == "/health" else 401)
        self.end_headers()
        self.wfile.write(b"[]")

    do_POST = do_GET

    def log_message(self, *args) -> None:
        pass


def test_the_key_of_all_servers_and_that_of_one(capsys) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Keyed) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        one = {"name": "a", "url": f"http://127.0.0.1:{server.server_port}", "kind": "llamacpp"}
        result = run(capsys, [one, {**one, "name": "b", "api_key": "wrong"}], api_key="right")
        server.shutdown()
    assert [entry["state"] for entry in result["results"]] == ["HEALTHY", "DEGRADED"]
