# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The ladder against real llama-servers, and many endpoints of which half are black holes."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from ansible_collections.homelab.inference.plugins.module_utils import probe
from systemd_node import LLAMA_IMAGE, RPC_SERVER, docker, until

ROOT = Path(__file__).resolve().parents[2]
SLOW = "--cpus=0.1"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    subprocess.run([sys.executable, ROOT / "tests/images/model/build.py", folder], check=True, capture_output=True)
    (folder / "broken.gguf").write_bytes(b"GGUF, but not really")
    return folder


class Container:
    def __init__(self, *run: str, port: int) -> None:
        self.name = f"probe-{secrets.token_hex(4)}"
        docker("run", "-d", "--name", self.name, *run)
        self.address = docker("inspect", "-f", "{{.NetworkSettings.IPAddress}}", self.name)
        self.url = f"http://{self.address}:{port}"

    def running(self) -> bool:
        return docker("inspect", "-f", "{{.State.Running}}", self.name) == "true"

    def ask(self, timeout: float = 8, mode: str = "chat", api_key: str | None = None) -> dict:
        wanted = {"url": self.url, "timeout": timeout, "kind": "llamacpp", "mode": mode, "api_key": api_key}
        return probe.probe(wanted)

    @contextlib.contextmanager
    def frozen(self):
        docker("kill", "--signal", "STOP", self.name)
        try:
            yield
        finally:
            docker("kill", "--signal", "CONT", self.name)


@pytest.fixture(scope="module")
def serve(models: Path):
    """Starts llama-server with a model, options of docker before it and its own after it."""
    made: list[Container] = []

    def add(container: Container) -> Container:
        made.append(container)
        return container

    def run(model: str, *options: str, limits: tuple[str, ...] = (), ready: bool = True) -> Container:
        server = ["--host", "0.0.0.0", "--port", "8080", "--model", f"/models/{model}.gguf"]
        started = (f"--volume={models}:/models:ro", "--entrypoint=llama-server", LLAMA_IMAGE)
        container = add(Container(*limits, *started, *server, "--parallel", "1", *options, port=8080))
        if ready:
            until("the first token", lambda: container.ask()["state"] in ("HEALTHY", "DEGRADED"))
        return container

    run.add = add
    yield run
    for container in made:
        docker("rm", "--force", "--volumes", container.name)


@pytest.fixture(scope="module")
def chat(serve) -> Container:
    return serve("chat", "--ctx-size", "2048", "--metrics")


def test_a_server_that_serves(chat: Container) -> None:
    result = chat.ask()
    assert result["state"] == "HEALTHY"
    assert result["evidence"] == ["/health: 200", "/slots: 0 of 1 at work", "/v1/chat/completions: 200"]


def test_an_embedding_server_is_asked_for_an_embedding(serve) -> None:
    embed = serve("embed", "--embeddings", "--pooling", "mean")
    assert embed.ask(mode="embedding")["evidence"][-1] == "/v1/embeddings: 200"


def test_a_server_with_a_key(serve) -> None:
    server = serve("chat", "--ctx-size", "512", "--api-key", "key-of-the-test")
    assert server.ask(api_key="key-of-the-test")["state"] == "HEALTHY"
    refused = server.ask(api_key="another")
    assert refused["state"] == "DEGRADED"
    assert "Invalid API Key" in refused["evidence"][-1]


def test_a_stopped_process_is_hung(chat: Container) -> None:
    with chat.frozen():
        assert chat.ask(timeout=1)["state"] == "HUNG"
    until("going on", lambda: chat.ask()["state"] == "HEALTHY")


def test_a_gpu_that_hangs_shows_although_health_is_fine(serve) -> None:
    gpu = serve.add(Container(f"--entrypoint={RPC_SERVER}", LLAMA_IMAGE, "-H", "0.0.0.0", "-p", "50052", port=50052))
    server = serve("chat", "--ctx-size", "512", "--rpc", f"{gpu.address}:50052", "--n-gpu-layers", "99")
    with gpu.frozen():
        result = server.ask(timeout=3)
        assert result["state"] == "HUNG"
        assert result["evidence"][0] == "/health: 200"


def test_a_long_prompt_is_busy(serve) -> None:
    server = serve("chat", "--ctx-size", "4096", "--batch-size", "64", limits=(SLOW,))
    prompt = {"prompt": [300 + index % 200 for index in range(3500)], "max_tokens": 500, "ignore_eos": True}
    request = urllib.request.Request(server.url + "/v1/completions", json.dumps(prompt).encode())
    answered = threading.Event()

    def send() -> None:
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=120) as response:
            response.read()
        answered.set()

    threading.Thread(target=send, daemon=True).start()
    time.sleep(0.5)
    result = server.ask()
    assert not answered.is_set(), "the prompt was too short to be looked at"
    assert result["state"] == "BUSY"
    assert "/slots: 1 of 1 at work" in result["evidence"]


def test_a_server_that_loads_is_starting_and_is_waited_for(serve) -> None:
    server = serve("chat", "--ctx-size", "2048", limits=(SLOW,), ready=False)
    loading = until("loading", lambda: (found := server.ask(timeout=1))["state"] == "STARTING" and found, 20)
    assert loading["evidence"] == ["/health: 503", "Loading model"]
    assert probe.wait_ready(server.url, 60, "chat", server.running)["state"] == "HEALTHY"


def test_a_broken_model_is_not_waited_for(serve) -> None:
    server = serve("broken", ready=False)
    result = probe.wait_ready(server.url, 60, "chat", server.running)
    assert not result["ready"]
    assert result["seconds"] < 20


def test_black_holes_cost_no_more_than_the_longest_deadline(chat: Container) -> None:
    """A listener whose queue is full lets new connections wait, as a host that is gone does."""
    with contextlib.ExitStack() as stack:
        holes = []
        for host in range(20):
            listener = stack.enter_context(socket.socket())
            listener.bind((f"127.0.9.{host + 1}", 0))
            listener.listen(0)
            for _number in range(4):
                filler = stack.enter_context(socket.socket())
                filler.setblocking(False)
                filler.connect_ex(listener.getsockname())
            holes.append("http://{}:{}/".format(*listener.getsockname()))
        endpoints = [
            {
                "name": str(index),
                "url": f"{chat.url}/health" if index % 2 else holes[index // 2 % 20],
                "tier": "REMOTE" if index % 2 else "NAS",
                "kind": "http",
                "timeout": 1 + index // 2 % 3,
            }
            for index in range(200)
        ]
        started = time.monotonic()
        results = probe.probe_all(endpoints)
        seconds = time.monotonic() - started
    assert seconds < 1.2 * max(endpoint["timeout"] for endpoint in endpoints)
    assert [result["name"] for result in results] == [str(index) for index in range(200)]
    assert probe.prognosis(results) == {"tiers": {"NAS": "DOWN", "REMOTE": "HEALTHY"}, "overall": "DEGRADED"}
    assert all(result["seconds"] <= endpoint["timeout"] + 0.5 for result, endpoint in zip(results, endpoints))
