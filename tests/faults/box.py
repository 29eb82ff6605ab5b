# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The box as somebody outside sees it: a shell on each node, and requests to what answers there."""

from __future__ import annotations

import contextlib
import http.server
import json
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
BOX = ROOT / ".cache" / "box"
NODES = {"hydrogen": "172.30.99.11", "helium": "172.30.99.12", "lithium": "172.30.99.13"}
STATE = "/var/lib/homelab-inference/lab"
SSH = [
    *("ssh", "-i", str(BOX / "ssh/id_ed25519"), "-o", f"UserKnownHostsFile={BOX}/ssh/known_hosts"),
    *("-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "-o", "LogLevel=ERROR"),
]


def docker(*words: str) -> str:
    """Run the engine that the nodes are containers of."""
    return subprocess.run(["docker", *words], check=True, capture_output=True, text=True, timeout=180).stdout


def lab(*words: str) -> str:
    """Say a word of ./lab, as the owner does at the machine that deploys."""
    done = subprocess.run([str(ROOT / "lab"), *words], capture_output=True, text=True, timeout=900, check=False)
    return done.stdout + done.stderr


def on(node: str, script: str, timeout: float = 120) -> str:
    """Run a script on a node as root; return what it prints.

    :raises subprocess.CalledProcessError: it failed, or the node does not let anybody in.
    """
    words = [*SSH, f"lab@{NODES[node]}", "sudo", "sh", "-s"]
    return subprocess.run(words, input=script, check=True, capture_output=True, text=True, timeout=timeout).stdout


def pid(node: str, name: str) -> int:
    """Return the process of a container."""
    return int(on(node, f"docker inspect -f '{{{{.State.Pid}}}}' {name}"))


def container(node: str, model: str) -> str:
    """Return the name of a node's container that serves a model."""
    return on(node, f"docker ps --all --format '{{{{.Names}}}}' --filter name=llamacpp-{model}").split()[0]


def lock() -> dict[str, Any]:
    """Return what is planned."""
    return yaml.safe_load((BOX / "lab.lock.yml").read_text(encoding="utf-8"))


def endpoints() -> dict[str, str]:
    """Return the URL that says how a server is, for each one and for the gateway."""
    found = {one["name"]: f"http://{NODES[one['node']]}:{one['port']}/health" for one in lock()["instances"]}
    return {**found, "gateway": f"http://{NODES['hydrogen']}:4000/health/liveliness"}


def well(url: str, timeout: float = 2) -> bool:
    """Return whether somebody answers with 200."""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as answer:
            return answer.status == 200
    except (OSError, urllib.error.URLError):
        return False


def generate(url: str, key: str) -> None:
    """Have a server generate something; whether it does is not said."""
    body = json.dumps({"max_tokens": 4, "messages": [{"role": "user", "content": "How are you?"}]}).encode()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    with contextlib.suppress(OSError):
        urllib.request.urlopen(urllib.request.Request(f"{url}/v1/chat/completions", body, headers), timeout=5).close()


def reports() -> list[dict[str, Any]]:
    """Return what recoveries told on the control node, oldest first."""
    text = on(
        "hydrogen",
        f"for file in {STATE}/lab.reports/*.json; do test -e $file && tr -d '\\n' <$file && echo; done; true",
    )
    return [json.loads(line) for line in text.splitlines() if line.strip()]


@contextlib.contextmanager
def plugs() -> Iterator[list[str]]:
    """Be the smart plugs of the nodes: whoever asks for one has it started. Gives the nodes that were switched on."""
    asked: list[str] = []

    class Plug(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            node = self.path.strip("/")
            if node in NODES:
                asked.append(node)
                docker("start", node)
            self.send_response(200 if node in NODES else 404)
            self.end_headers()

        def log_message(self, *_words: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("172.30.99.1", 8098), Plug)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield asked
    finally:
        server.shutdown()
        server.server_close()
