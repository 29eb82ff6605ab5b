# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""llamacpp_container where a unit starts the server: a node with systemd, the node program and its own engine."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import time
from pathlib import Path

import pytest

IMAGE = "homelab-inference/llama.cpp:dev"
NODE_IMAGE = "homelab-inference/node:dev"
ROOT = Path(__file__).parents[2]
CAPABILITIES = (
    "SYS_ADMIN NET_ADMIN NET_RAW SYS_PTRACE MKNOD AUDIT_WRITE DAC_READ_SEARCH SYSLOG IPC_LOCK SYS_NICE LINUX_IMMUTABLE"
)
UNIT = """[Unit]
StartLimitIntervalSec=600
StartLimitBurst=3
[Service]
Type=notify
ExecStart=/usr/bin/python3 /usr/local/lib/homelab-inference/node.py serve chat
KillMode=mixed
Restart=on-failure
RestartSec=1
"""
INSTANCE = {
    "name": "chat",
    "backend": "cpu",
    "devices": [],
    "port": 8080,
    "address": "127.0.0.1",
    "published_address": "0.0.0.0",
    "mode": "chat",
    "ready_timeout": 60,
}


class Node:
    """A container that boots systemd; the module runs on it with the node's own Python and Docker SDK."""

    def __init__(self, models):
        self.name = f"lctu-{secrets.token_hex(3)}"
        if Path("/sys/fs/cgroup/cgroup.controllers").exists():
            rights = ["--privileged"]
        else:
            rights = [f"--cap-add={name}" for name in CAPABILITIES.split()]
            rights += [f"--security-opt={name}=unconfined" for name in ("seccomp", "apparmor", "systempaths")]
            rights += ["--cgroupns=host", "--volume=/sys/fs/cgroup:/sys/fs/cgroup:rw"]
            flags = "SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1 systemd.unified_cgroup_hierarchy=0"
            rights.append(f"--env=SYSTEMD_PROC_CMDLINE={flags}")
        rights += ["--volume=/var/lib/docker", "--tmpfs=/run", "--tmpfs=/tmp"]
        subprocess.run(
            ["docker", "run", "-d", "--name", self.name, *rights, NODE_IMAGE, "/sbin/init"],
            check=True,
            capture_output=True,
        )
        # Only what a module brings along: Ansible's own helpers for modules, and this collection's.
        import ansible.module_utils

        helpers = Path(ansible.module_utils.__file__).parent
        self.pack([helpers], "/opt/test/ansible")
        self.write("/opt/test/ansible/__init__.py", "")
        self.pack([ROOT / "plugins"], "/opt/test/ansible_collections/homelab/inference")
        self.pack(
            [ROOT / "roles/inference_node/files/node.py", *(ROOT / "plugins/module_utils").glob("[gp]*e.py")],
            "/usr/local/lib/homelab-inference",
        )
        self.pack(list(models.glob("*.gguf")), "/srv/models")
        self.write("/etc/homelab-inference/slice.json", json.dumps({"generation": None, "instances": [INSTANCE]}))
        self.write("/etc/systemd/system/llamacpp-chat.service", UNIT)
        end = time.monotonic() + 60
        while subprocess.run(
            ["docker", "exec", self.name, "docker", "info"], capture_output=True, check=False
        ).returncode:
            assert time.monotonic() < end, "the node has no engine after 60 s"
            time.sleep(0.5)
        with subprocess.Popen(["docker", "save", IMAGE], stdout=subprocess.PIPE) as saved:
            subprocess.run(
                ["docker", "exec", "-i", self.name, "docker", "load"],
                stdin=saved.stdout,
                check=True,
                capture_output=True,
            )
        self.sh("systemctl daemon-reload; docker volume create models")
        self.sh("cp /srv/models/* /var/lib/docker/volumes/models/_data/")

    def pack(self, paths, folder):
        """Copy files and folders into a folder of the node."""
        self.sh(f"mkdir -p {folder}")
        for path in paths:
            subprocess.run(["docker", "cp", str(path), f"{self.name}:{folder}/"], check=True, capture_output=True)

    def write(self, path, text):
        script = f"mkdir -p {Path(path).parent} && cat >{path}"
        subprocess.run(["docker", "exec", "-i", self.name, "sh", "-c", script], input=text, text=True, check=True)

    def sh(self, script, check=True):
        done = subprocess.run(
            ["docker", "exec", self.name, "sh", "-c", script],
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(f"{script}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def run(self, check=False, **changes):
        options = {
            "name": "llamacpp-chat",
            "unit": "llamacpp-chat.service",
            "image": IMAGE,
            "pull": "never",
            "volume": "models",
            "model_file": "chat.gguf",
            "alias": "chat",
            "port": 8080,
            "published_address": "0.0.0.0",
            "cpus": 1,
            "memory_mib": 500,
            "server_options": {"ctx-size": 512, "parallel": 1},
            "ready_timeout": 60,
            "stop_timeout": 5,
            "_ansible_check_mode": check,
            "_ansible_diff": True,
            **changes,
        }
        done = subprocess.run(
            ["docker", "exec", "-i", "-e", "PYTHONPATH=/opt/test", self.name, "python3"]
            + ["-m", "ansible_collections.homelab.inference.plugins.modules.llamacpp_container"],
            input=json.dumps({"ANSIBLE_MODULE_ARGS": options}),
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.stdout, done.stderr
        return json.loads(done.stdout)

    def started_at(self):
        return self.sh("docker inspect -f '{{.State.StartedAt}}' llamacpp-chat")

    def active(self):
        return self.sh("systemctl is-active llamacpp-chat", check=False)


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    models = tmp_path_factory.mktemp("models")
    subprocess.run([sys.executable, ROOT / "tests/images/model/build.py", models], check=True, capture_output=True)
    (models / "half.gguf").write_bytes((models / "chat.gguf").read_bytes()[:200_000])
    node = Node(models)
    yield node
    subprocess.run(["docker", "rm", "-fv", node.name], capture_output=True, check=False)


def test_the_unit_starts_replaces_and_brings_back(node):
    foreseen = node.run(check=True)
    made = node.run()
    assert foreseen["actions"] == made["actions"] == ["create", "start"], made
    assert node.active() == "active"
    assert node.sh("curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1:8080/health") == "200"
    started_at = node.started_at()
    assert not node.run()["changed"]
    assert node.started_at() == started_at

    changed = node.run(server_options={"ctx-size": 256, "parallel": 1})
    assert changed["actions"] == ["replace", "start"], changed
    assert node.active() == "active"
    container = changed["container"]["id"]

    failed = node.run(model_file="half.gguf", server_options={"ctx-size": 256, "parallel": 1})
    assert failed["msg"] == (
        "Starting llamacpp-chat failed: the model file is corrupt or incomplete. The previous container serves again."
    )
    assert failed["restored"] is True
    assert node.active() == "active"
    assert node.sh("docker inspect -f '{{.Id}}' llamacpp-chat") == container
    assert node.sh("docker ps -aq --filter name=previous") == ""

    # A unit that was stopped is a server that does not serve, whatever the container does.
    node.sh("systemctl stop llamacpp-chat")
    assert node.run(check=True, server_options={"ctx-size": 256, "parallel": 1})["actions"] == ["start"]
    assert node.run(server_options={"ctx-size": 256, "parallel": 1})["actions"] == ["start"]
    assert node.active() == "active"

    assert node.run(state="absent")["actions"] == ["remove"]
    assert node.active() in ("inactive", "failed")
    assert node.sh("docker ps -aq") == ""


def test_a_server_that_is_never_ready_is_told_from_one_that_died(node):
    """A successor that starts, never answers and takes no notice of SIGTERM, as one that hangs while it loads."""
    node.run()
    slice_file = "/etc/homelab-inference/slice.json"
    node.write(slice_file, json.dumps({"generation": None, "instances": [{**INSTANCE, "ready_timeout": 5}]}))
    recipe = f'FROM {IMAGE}\\nENTRYPOINT ["sh", "-c", "trap true TERM; while true; do sleep 1; done"]\\n'
    node.sh(f"printf '{recipe}' | docker build -q -t silent:1 -")
    failed = node.run(image="silent:1", stop_timeout=2)
    assert "not ready within 5 s" in failed["msg"], failed
    assert "killed" not in failed["msg"]
    assert failed["msg"].endswith("The previous container serves again.")
    assert node.active() == "active"
    node.write(slice_file, json.dumps({"generation": None, "instances": [INSTANCE]}))
    node.run(state="absent")


def test_a_unit_that_is_missing_is_said(node):
    failed = node.run(unit="llamacpp-none.service", name="llamacpp-none", port=8081)
    assert failed["failed"]
    assert "llamacpp-none.service not found" in failed["msg"]
    assert node.run(state="absent", unit="llamacpp-none.service", name="llamacpp-none")["actions"] == ["remove"]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"server_options": {"load-mode": "mlock"}},
        {"backend": "cuda", "devices": [{"id": "gpu0", "vendor": "nvidia", "uuid": "GPU-0"}]},
        {"backend": "rocm", "devices": [{"id": "gpu0", "vendor": "amd", "groups": [992, 44]}]},
    ],
    ids=["cpu", "mlock", "cuda", "rocm"],
)
def test_this_engine_too_gives_back_what_it_was_given(node, change):
    assert node.run(state="present", **change)["changed"]
    assert not node.run(state="present", **change)["changed"]
    node.run(state="absent")
