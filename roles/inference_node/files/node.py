# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The node program: what the systemd unit of each model server runs.

serve NAME starts the server's container behind the host's start gate, tells systemd when the server has made its first
token, and stays until the container ends. A container that already serves is taken over as it is. SIGTERM stops it.
status prints, as JSON, who holds the start gate and how each server of this node is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gate
import probe

SLICE = Path("/etc/homelab-inference/slice.json")
API_KEY = Path("/etc/homelab-inference/api-key")

# How long an engine may be away, for example while its package is updated.
ENGINE_DEADLINE_S = 300
# What docker start, docker stop and the hand-over of the lock take at most, beside the waits with their own deadlines.
MARGIN_S = 120

# Exit codes, for the unit: the first three are not mended by another try.
NOT_DECLARED = 10
NO_CONTAINER = 11
NOT_READY = 12
ENGINE_AWAY = 13
GATE_CLOSED = 14
ENDED_LOADING = 15
ENDED_SERVING = 16


class NodeError(Exception):
    """The server cannot be served; code becomes the exit code."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs the model servers of this node.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("serve", help="run one server (called by its systemd unit)").add_argument("name")
    commands.add_parser("status", help="print the state of all servers as JSON")
    arguments = parser.parse_args()
    try:
        instances = {instance["name"]: instance for instance in json.loads(SLICE.read_text())["instances"]}
        if arguments.command == "status":
            print(json.dumps(status(instances), indent=2))
            return 0
        if arguments.name not in instances:
            raise NodeError(NOT_DECLARED, f"Serving {arguments.name}: {SLICE} does not name it. Run site.yml.")
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        return serve(instances[arguments.name], instances)
    except (NodeError, gate.GateError) as error:
        notify(f"STATUS={error}")
        log(str(error))
        return error.code if isinstance(error, NodeError) else GATE_CLOSED


def serve(instance: dict[str, Any], instances: dict[str, dict[str, Any]]) -> int:
    container = f"llamacpp-{instance['name']}"
    try:
        if not serves_already(instance, container):
            if instance["devices"]:
                others = [other for other in instances.values() if other["devices"] and other is not instance]
                deadline_s = sum(other["ready_timeout"] for other in others) + MARGIN_S
                extend_start(deadline_s)
                with gate.start_gate(gate.LOCK, instance["name"], "start", deadline_s, say_who):
                    log("start lock taken")
                    start(instance, container)
                log("start lock released")
            else:
                start(instance, container)
        notify(f"READY=1\nSTATUS=Serves on {url_of(instance)}")
        return follow(container)
    except KeyboardInterrupt:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        notify("STOPPING=1\nSTATUS=Stops the server")
        stop(container)
        return 0


def serves_already(instance: dict[str, Any], container: str) -> bool:
    """Whether the container was left running, as a live-restore or the end of this program alone leaves it."""
    extend_start(ENGINE_DEADLINE_S)
    if not inspect(container)["State"]["Running"]:
        return False
    result = probe.probe(endpoint(instance))
    log(f"{container} is running: {result['state']} ({result['evidence'][-1]})")
    return result["state"] in probe.SERVING


def start(instance: dict[str, Any], container: str) -> None:
    """Start the container and wait for its first token; one that does not get there is stopped, to hold no memory."""
    deadline_s = instance["ready_timeout"]
    extend_start(deadline_s)
    if inspect(container)["State"]["Running"]:
        stop(container)
    started = docker("start", container)
    if started.returncode != 0:
        raise NodeError(ENDED_LOADING, f"Starting {container}: {started.stderr.strip()}")
    notify(f"STATUS=Waits up to {deadline_s} s for the first token")
    try:
        with waiting_for_end(container) as end:
            result = probe.wait_ready(
                url_of(instance),
                deadline_s,
                mode_of(instance),
                lambda: end.poll() is None or is_running(container),
                api_key(),
            )
    except KeyboardInterrupt:
        stop(container)  # before the gate lets the next one in
        raise
    if result["ready"]:
        log(f"ready after {result['seconds']} s")
        return
    ended = not is_running(container)
    stop(container)
    raise NodeError(
        ENDED_LOADING if ended else NOT_READY,
        f"Starting {container}: {', '.join(result['evidence'])}. See: docker logs {container}",
    )


def follow(container: str) -> int:
    """Stay until the container ends, through restarts of the engine."""
    while True:
        with waiting_for_end(container) as end:
            end.wait()
        state = inspect(container)["State"]
        if not state["Running"]:
            break
        log("the engine was away; the server went on")
        time.sleep(1)
    if state["ExitCode"] == 0:
        log("somebody stopped the container")
        return 0
    cause = "out of memory" if state["OOMKilled"] else f"exit code {state['ExitCode']}"
    raise NodeError(ENDED_SERVING, f"Serving {container}: the server ended ({cause}). See: docker logs {container}")


def stop(container: str) -> None:
    """Docker kills what does not end within the container's own stop timeout."""
    done = docker("stop", container)
    if done.returncode != 0:
        raise NodeError(ENGINE_AWAY, f"Stopping {container}: {done.stderr.strip()}")


def inspect(container: str) -> dict[str, Any]:
    deadline = time.monotonic() + ENGINE_DEADLINE_S
    while True:
        done = docker("container", "inspect", container)
        if done.returncode == 0:
            return json.loads(done.stdout)[0]
        if "no such container" in done.stderr.lower():
            raise NodeError(NO_CONTAINER, f"Serving {container}: there is no such container. Run site.yml.")
        if time.monotonic() >= deadline:
            raise NodeError(ENGINE_AWAY, f"Asking for {container}: {done.stderr.strip()}. Start the Docker engine.")
        notify("STATUS=Waits for the Docker engine")
        time.sleep(1)


def is_running(container: str) -> bool:
    return inspect(container)["State"]["Running"]


def docker(*arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=MARGIN_S, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(arguments, 124, "", f"docker {arguments[0]} gave no answer in {MARGIN_S} s")


@contextlib.contextmanager
def waiting_for_end(container: str) -> Iterator[subprocess.Popen[bytes]]:
    """A docker wait, which ends with the container or with the engine."""
    child = subprocess.Popen(["docker", "wait", container], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield child
    finally:
        child.terminate()
        child.wait()


def status(instances: dict[str, dict[str, Any]]) -> dict[str, Any]:
    servers = probe.probe_all([endpoint(instance) for instance in instances.values()])
    return {"start_lock": gate.holder_of(gate.LOCK), "servers": servers}


def endpoint(instance: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": instance["name"],
        "url": url_of(instance),
        "tier": "LOCAL",
        "timeout": 8.0,
        "kind": "llamacpp",
        "mode": mode_of(instance),
        "api_key": api_key(),
    }


def mode_of(instance: dict[str, Any]) -> str:
    """How its health is asked for."""
    return probe.TURNS if instance.get("models") else instance["mode"]


def url_of(instance: dict[str, Any]) -> str:
    address = instance["published_address"]
    return f"http://{'127.0.0.1' if address == '0.0.0.0' else address}:{instance['port']}"


def api_key() -> str | None:
    """The first key of the file that the servers read."""
    lines = API_KEY.read_text().split() if API_KEY.exists() else []
    return lines[0] if lines else None


def say_who(holder: dict[str, Any]) -> None:
    message = f"waits for the start lock: {gate.describe(holder)}"
    notify(f"STATUS={message}")
    log(message)


def extend_start(seconds: float) -> None:
    """Tell systemd how long the next step may take, on top of what was before it."""
    notify(f"EXTEND_TIMEOUT_USEC={int((seconds + MARGIN_S) * 1_000_000)}")


def notify(message: str) -> None:
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
            connection.connect(address.replace("@", "\0", 1))
            connection.sendall(message.encode())


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
