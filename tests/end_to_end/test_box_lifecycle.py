# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The box comes and goes without a trace, on a machine that has Python 3 and nothing else.

The machine is a container of bare Debian, so that what is compared is all there is. It takes about ten minutes and is
run by name::

    LAB_LIFECYCLE=1 pytest -s tests/end_to_end/test_box_lifecycle.py
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUITE = os.environ.get("LAB_LIFECYCLE_SUITE", "bookworm")
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")

pytestmark = pytest.mark.skipif("LAB_LIFECYCLE" not in os.environ, reason="takes ten minutes; set LAB_LIFECYCLE=1")

# What a machine shows of itself, one fact a line. Packages and their own state are no traces of the box.
SNAPSHOT = r"""
ls /sys/class/net | sed 's/^/link /'
for table in /proc/net/tcp /proc/net/tcp6; do
    awk -v t=$table 'FNR > 1 && $4 == "0A" {print "listens", t, $2}' $table
done
for save in iptables-save ip6tables-save; do
    command -v $save >/dev/null && $save | grep -v '^#' | sed "s/\[.*//; s/^/$save /"
done
awk '$3 != "Z" {print "process", $2}' /proc/[0-9]*/stat 2>/dev/null |
    sort | grep -v -E '\((sleep|(ba)?sh|awk|grep|sort)\)'
cut -d' ' -f2 /proc/mounts | sed 's/^/mount /'
find /etc /root /home /srv /opt /usr/local /var/lib /var/spool /run /tmp /var/tmp -xdev -type f -not -name '*.pyc' \
    -not -path '/root/clone/.cache/*' -not -path '/root/.cache/pip/*' -not -path '/root/.ansible/*' \
    -not -path '/var/lib/apt/*' -not -path '/var/lib/dpkg/*' -not -path '/run/mount/*' \
    -not -path '/var/lib/docker/*' -not -path '/var/lib/containerd/*' \
    -not -path '/run/containerd/*' -not -path '/run/docker/*' |
    sed 's/^/file /'
find /sys/fs/cgroup/memory/docker/$MACHINE -mindepth 1 -type d 2>/dev/null | sed 's/^/cgroup /'
true
"""

NODE_RUN = [
    *("--cgroupns=host", "--volume=/sys/fs/cgroup:/sys/fs/cgroup:rw", "--volume=/var/lib/docker"),
    *(f"--security-opt={option}=unconfined" for option in ("seccomp", "apparmor", "systempaths")),
    *(
        f"--cap-add={capability}"
        for capability in (
            *("SYS_ADMIN", "NET_ADMIN", "NET_RAW", "SYS_PTRACE", "MKNOD", "AUDIT_WRITE", "DAC_READ_SEARCH"),
            *("SYSLOG", "IPC_LOCK", "SYS_NICE", "LINUX_IMMUTABLE"),
        )
    ),
]


class Machine:
    """A bare Debian with a clone of the project in /root/clone."""

    def __init__(self, name: str, image: str) -> None:
        self.name = name
        version2 = Path("/sys/fs/cgroup/cgroup.controllers").exists()
        run = ["--privileged", "--volume=/var/lib/docker"] if version2 else NODE_RUN
        borrowed = [f"--volume={path}:{path}:ro" for path in (CERTIFICATES, Path("/etc/pip.conf")) if path.exists()]
        self.id = docker("run", "--detach", "--name", name, "--hostname", "machine", *run, *borrowed, image).strip()

    def sh(self, command: str, fails: bool = False) -> str:
        """Run a command; return what it prints on both channels."""
        words = ["docker", "exec", "--env", f"MACHINE={self.id}", self.name, "bash", "-c", f"cd /root/clone; {command}"]
        result = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        assert (result.returncode != 0) == fails, f"{command}: {result.returncode}\n{result.stdout[-4000:]}"
        return result.stdout

    def traces(self) -> set[str]:
        """Return what there is on the machine, once Ansible's kept SSH connections (60 s) are gone."""
        deadline = time.monotonic() + 90
        while True:
            traces = set(self.sh(SNAPSHOT).splitlines())
            if "process (ssh)" not in traces or time.monotonic() > deadline:
                return traces
            time.sleep(2)


def docker(*words: str) -> str:
    """Run docker on this machine."""
    return subprocess.run(["docker", *words], capture_output=True, text=True, check=True).stdout


def pipe(first: list[str], second: list[str]) -> None:
    """Run two commands, the output of one the input of the other."""
    with subprocess.Popen(first, stdout=subprocess.PIPE) as process:
        subprocess.run(second, stdin=process.stdout, stdout=subprocess.DEVNULL, check=True)
    assert process.returncode == 0, first


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """Make the bare machine; it has ca-certificates besides Python, for this machine's package mirrors."""
    engine = subprocess.run(["docker", "version"], capture_output=True, check=False).returncode == 0
    if not engine or not shutil.which("mmdebstrap"):
        pytest.skip("needs an engine and mmdebstrap")
    name = f"lifecycle-{secrets.token_hex(4)}"
    packages = ["--variant=minbase", "--include=python3,ca-certificates", '--aptopt=Acquire::Check-Valid-Until "false"']
    pipe(
        ["mmdebstrap", "--quiet", *packages, SUITE, "-", "http://deb.debian.org/debian"],
        ["docker", "import", "--change", 'CMD ["sleep", "infinity"]', "-", name],
    )
    try:
        made = Machine(name, name)
        docker("exec", name, "mkdir", "/root/clone")
        files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        unpack = ["docker", "exec", "-i", name, "tar", "-xC", "/root/clone"]
        pipe(["tar", "-cC", str(ROOT), *files.splitlines()], unpack)
        yield made
    finally:
        subprocess.run(["docker", "rm", "--force", "--volumes", name], capture_output=True, check=False)
        subprocess.run(["docker", "rmi", name], capture_output=True, check=False)


def network(traces: set[str]) -> set[str]:
    """Return what apt does not change: links, listeners, rules, processes, mounts, cgroups."""
    return {line for line in traces if not line.startswith("file ")}


def test_from_nothing_to_an_answer_and_back(machine: Machine) -> None:
    bare = machine.traces()
    began = time.monotonic()
    machine.sh("./lab up")
    answered_first = time.monotonic() - began
    print(f"\nfrom a clone to an answer: {answered_first:.0f} s")
    answer = machine.sh("./lab ask 'How are you?'")
    assert "random weights" in answer
    assert len(answer.split()) > 12
    assert "helium" in machine.sh("./lab status")

    # Others use the engine meanwhile: it stays, and so does their container, not even restarted.
    machine.sh("docker run --detach --name foreign --entrypoint sleep homelab-inference/llama.cpp:server-rpc infinity")
    started = machine.sh("docker inspect --format '{{.State.StartedAt}}' foreign")
    machine.sh("./lab up")
    assert "other containers run on it" in machine.sh("./lab down")
    assert machine.sh("docker inspect --format '{{.State.StartedAt}}' foreign") == started
    assert machine.sh("docker ps --all --format '{{.Names}}'").split() == ["foreign"]
    assert machine.sh("docker network ls --format '{{.Name}}' | sort").split() == ["bridge", "host", "none"]
    assert machine.sh("docker volume ls --quiet") == ""
    machine.sh("docker rm --force foreign && ./lab down")

    gone = machine.traces()
    # iptables is a package of its own: bare, there was no table to list.
    assert {line for line in network(gone) if "tables-save" not in line} == network(bare)
    assert not [line for line in gone if "-A " in line or "DOCKER" in line or "DROP" in line]

    began = time.monotonic()
    machine.sh("./lab up")
    answered_again = time.monotonic() - began
    print(f"with the images there: {answered_again:.0f} s")
    machine.sh("./lab down")
    assert machine.traces() == gone

    machine.sh("./lab down --all")
    assert machine.sh("ls -A .cache 2>/dev/null; true") == ""
    machine.sh("(dockerd >/dev/null 2>&1 &) ; sleep 5")
    assert machine.sh("docker images --quiet") == ""


def test_a_node_of_somebody_else_is_not_touched(machine: Machine) -> None:
    machine.sh("docker version >/dev/null 2>&1 || (dockerd >/dev/null 2>&1 & sleep 5)")
    machine.sh("tar -cC /usr/bin sleep | docker import - foreign && docker create --name helium foreign /sleep 1")
    assert "a container of this name exists and is not of the box" in machine.sh("./lab up", fails=True)
    machine.sh("./lab down")
    assert machine.sh("docker ps --all --format '{{.Names}}'").split() == ["helium"]
