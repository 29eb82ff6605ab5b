# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A machine for tests: a container that boots systemd and runs a Docker engine of its own."""

from __future__ import annotations

import secrets
import subprocess
import time
from pathlib import Path
from typing import Callable

NODE_IMAGE = "homelab-inference/node:dev"
LLAMA_IMAGE = "homelab-inference/llama.cpp:dev"
RPC_SERVER = "/usr/libexec/x86_64-linux-gnu/llama/bin/ggml-rpc-server"
CAPABILITIES = (
    "SYS_ADMIN NET_ADMIN NET_RAW SYS_PTRACE MKNOD AUDIT_WRITE DAC_READ_SEARCH SYSLOG IPC_LOCK SYS_NICE LINUX_IMMUTABLE"
)


def docker(*arguments: str, **more) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=180, check=False, **more)
    if done.returncode:
        raise RuntimeError(f"docker {' '.join(arguments)}: {done.stdout}{done.stderr}")
    return done.stdout.strip()


def until(what: str, true: Callable[[], object], seconds: float = 60):
    """Wait for something to become true, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := true()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {seconds:g} s")
        time.sleep(0.2)
    return found


class Node:
    """Used as a context: what it made is gone afterwards."""

    def __init__(self) -> None:
        self.name = f"node-{secrets.token_hex(4)}"

    def __enter__(self) -> Node:
        if Path("/sys/fs/cgroup/cgroup.controllers").exists():
            rights = ["--privileged"]
        else:
            rights = [f"--cap-add={name}" for name in CAPABILITIES.split()]
            rights += [f"--security-opt={name}=unconfined" for name in ("seccomp", "apparmor", "systempaths")]
            rights += ["--cgroupns=host", "--volume=/sys/fs/cgroup:/sys/fs/cgroup:rw"]
            legacy = "SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1 systemd.unified_cgroup_hierarchy=0"
            rights += [f"--env=SYSTEMD_PROC_CMDLINE={legacy}"]
        mounts = ["--volume=/var/lib/docker", "--tmpfs=/run", "--tmpfs=/tmp"]
        docker("run", "-d", "--name", self.name, *mounts, *rights, NODE_IMAGE, "/sbin/init")
        until("the engine's start", lambda: self.run("docker info", check=False).returncode == 0)
        return self

    def __exit__(self, *_: object) -> None:
        docker("rm", "--force", "--volumes", self.name)

    def run(self, script: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = ["docker", "exec", self.name, "sh", "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
        if check and done.returncode:
            raise RuntimeError(f"{script}: rc {done.returncode}: {done.stdout}{done.stderr}")
        return done

    def __call__(self, script: str) -> str:
        return self.run(script).stdout.strip()

    def load(self, image: str) -> None:
        """Give the node's engine an image that this machine's engine has."""
        with subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE) as save:
            subprocess.run(
                ["docker", "exec", "-i", self.name, "docker", "load"],
                stdin=save.stdout,
                stdout=subprocess.DEVNULL,
                timeout=300,
                check=True,
            )

    def write(self, path: str, content: str | bytes) -> None:
        script = f"mkdir -p $(dirname {path}) && cat >{path}"
        data = content.encode() if isinstance(content, str) else content
        subprocess.run(["docker", "exec", "-i", self.name, "sh", "-c", script], input=data, timeout=60, check=True)
