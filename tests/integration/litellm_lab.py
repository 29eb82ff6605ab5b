# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Real model servers in containers of this machine's engine, for the tests of the gateway in front of them."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LITELLM = "homelab-inference/litellm:dev"
LLAMACPP = "homelab-inference/llama.cpp:dev"

# Everything that a shell, YAML or a template could trip over, and that an HTTP header can carry.
NASTY = """'"$HOME$(id)`id`\\n{{x}}%s;&|<>#!*"""


def docker(*arguments: str, check: bool = True) -> str:
    """Run docker and return what it printed."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        raise AssertionError(f"docker {' '.join(arguments)}: {done.stderr}")
    return done.stdout.strip()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def make_images() -> None:
    """Make the images that are not there yet."""
    subprocess.run([ROOT / "tests/images/litellm/build", LITELLM], check=True)
    subprocess.run([ROOT / "tests/images/llama.cpp/build", LLAMACPP], check=True)


def ansible(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one of Ansible's programs out of the environment that runs the tests."""
    program = Path(sys.executable).with_name(command[0])
    return subprocess.run(
        [str(program), *command[1:]],
        cwd=ROOT,
        env={
            **os.environ,
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_CALLBACK_RESULT_FORMAT": "json",
            "ANSIBLE_NOCOLOR": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )


class Lab:
    """Model servers on the engine's default bridge; close() removes them."""

    def __init__(self, directory: Path, api_key: str) -> None:
        self.name = f"gw-{secrets.token_hex(4)}"
        self.containers: list[str] = []
        self.directory = directory
        subprocess.run([sys.executable, str(ROOT / "tests/images/model/build.py"), str(directory)], check=True)
        (directory / "api-key").write_text(f"{api_key}\n")

    def close(self) -> None:
        """Remove what was made."""
        if self.containers:
            docker("rm", "--force", "--volumes", *self.containers, check=False)

    def run(self, name: str, *arguments: str) -> str:
        """Run a container and return its full name."""
        full = f"{self.name}-{name}"
        self.containers.append(full)
        docker("run", "--detach", "--name", full, *arguments)
        return full

    def serve(self, name: str, model: str, *options: str) -> str:
        """Start a llama-server that wants the API key, and return its address."""
        mount = f"{self.directory}:/models:ro"
        full = self.run(
            name,
            *("--volume", mount, LLAMACPP),
            *("--host", "0.0.0.0", "--port", "8080", "--model", f"/models/{model}.gguf", "--alias", model),
            *("--api-key-file", "/models/api-key", "--ctx-size", "512", "--threads", "1", "--metrics", *options),
        )
        address = docker("inspect", "--format", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", full)
        wait_for(f"http://{address}:8080/health", 60)
        return f"http://{address}:8080"


def wait_for(url: str, seconds: float) -> None:
    """Wait until the URL answers 200."""
    deadline = time.monotonic() + seconds
    while request(url)[0] != 200:
        if time.monotonic() > deadline:
            raise AssertionError(f"{url} did not answer within {seconds} s")
        time.sleep(0.5)


def request(url: str, key: str | None = None, body: dict[str, Any] | None = None) -> tuple[int, str]:
    """Ask and return status and body; status 0 is no answer at all."""
    asked = urllib.request.Request(url, data=json.dumps(body).encode() if body else None)
    asked.add_header("Content-Type", "application/json")
    if key is not None:
        asked.add_header("Authorization", f"Bearer {key}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(asked, timeout=180) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")
    except OSError:
        return 0, ""


def chat(gateway: str, key: str, model: str, **other: Any) -> tuple[int, str]:
    """Ask a model for a few words."""
    body = {"model": model, "max_tokens": 4, "messages": [{"role": "user", "content": "hello"}], **other}
    return request(f"{gateway}/v1/chat/completions", key, body)
