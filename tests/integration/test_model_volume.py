# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""model_volume against the Docker engine of this machine, through ansible-playbook."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import docker
import pytest
from ansible_collections.homelab.inference.plugins.module_utils.model_files import ModelFilesError, Store, Wanted

ROOT = Path(__file__).resolve().parents[2]
ANSIBLE = Path(sys.executable).with_name("ansible-playbook")
IMAGE = "homelab-inference/llama.cpp:dev"
NODE_IMAGE = "homelab-inference/node:dev"
MIB = 1 << 20


@pytest.fixture(scope="module")
def engine():
    return docker.from_env(version="auto")


@pytest.fixture
def prefix(engine):
    """A name that nobody else uses; whatever carries it is removed afterwards."""
    name = f"mvtest-{secrets.token_hex(4)}"
    yield name
    for container in engine.containers.list(all=True, filters={"name": name}):
        container.remove(force=True, v=True)
    for volume in engine.volumes.list(filters={"name": name}):
        volume.remove()


class Run:
    """One task of model_volume and what came of it."""

    def __init__(
        self, folder: Path, *, check=False, verbose=False, inventory="localhost,", variables=None, kill=None, **options
    ):
        self.result_file = folder / "result.json"
        self.result_file.unlink(missing_ok=True)
        play = [
            {
                "hosts": "all",
                "gather_facts": False,
                "tasks": [
                    {
                        "homelab.inference.model_volume": options,
                        "register": "outcome",
                        "ignore_errors": True,
                    },
                    {
                        "ansible.builtin.copy": {
                            "content": "{{ outcome | to_json }}",
                            "dest": str(self.result_file),
                            "mode": "0600",
                        },
                        "delegate_to": "localhost",
                        "vars": {"ansible_connection": "local", "ansible_python_interpreter": sys.executable},
                        "check_mode": False,
                        "diff": False,
                        "become": False,
                    },
                ],
            }
        ]
        (folder / "play.json").write_text(json.dumps(play))
        given = variables or {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
        command = [str(ANSIBLE), "-i", inventory, str(folder / "play.json"), "--diff", "-e", json.dumps(given)]
        environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")}
        environment["ANSIBLE_COLLECTIONS_PATH"] = str(ROOT / ".cache")
        if variables is None:
            # The usual directory is shared with whatever else runs Ansible on this machine.
            environment["ANSIBLE_ASYNC_DIR"] = str(folder / "async")
        process = subprocess.Popen(
            command + ["--check"] * check + ["-vvv"] * verbose,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
        )
        if kill:
            kill(process)
        self.output = process.communicate(timeout=300)[0]
        self.outcome = json.loads(self.result_file.read_text()) if self.result_file.exists() else {}

    def __getattr__(self, key):
        if key not in self.outcome:
            raise AssertionError(f"no {key} in the result:\n{self.output}")
        return self.outcome[key]

    @property
    def failed(self):
        return self.outcome.get("failed", False)


@pytest.fixture
def task(tmp_path):
    return lambda **options: Run(tmp_path, **options)


def write(path: Path, size: int) -> str:
    """A file of this size that does not compress, and its digest."""
    digest = hashlib.sha256()
    with path.open("wb") as handle:
        for _index in range(0, size, MIB):
            block = os.urandom(min(MIB, size))
            handle.write(block)
            digest.update(block)
    return digest.hexdigest()


def mountpoint(engine, name: str) -> Path:
    return Path(engine.volumes.get(name).attrs["Mountpoint"])


def test_shards_check_diff_idempotence_and_removal(engine, prefix, task, tmp_path):
    shards = []
    for number in (1, 2):
        path = tmp_path / f"chat-{number}.gguf"
        shards.append({"name": f"sub/chat-{number}.gguf", "path": str(path), "sha256": write(path, 2 * MIB)})
    want = {"name": prefix, "files": shards}

    planned = task(check=True, **want)
    assert planned.changed
    assert [(one["action"], one["bytes"]) for one in planned.files] == [("fetch", 2 * MIB)] * 2
    assert planned.diff["before"] == {}
    assert re.search(r"\+ +sub/chat-2.gguf:\n\+ +bytes: 2097152\n\+ +sha256: " + shards[1]["sha256"], planned.output)
    assert not engine.volumes.list(filters={"name": prefix})

    made = task(**want)
    assert made.changed
    assert made.diff == planned.diff
    assert (made.fetched_bytes, made.hashed_bytes) == (4 * MIB, 4 * MIB)
    assert engine.volumes.get(prefix).attrs["Labels"] == {"homelab.inference.managed": "true"}
    for shard in shards:
        assert (mountpoint(engine, prefix) / shard["name"]).read_bytes() == Path(shard["path"]).read_bytes()

    for check in (True, False):
        again = task(check=check, **want)
        assert (again.changed, again.hashed_bytes, again.fetched_bytes) == (False, 0, 0)
        assert again.diff["before"] == again.diff["after"]
    assert task(verify="always", **want).hashed_bytes == 4 * MIB

    # What an unprivileged container sees.
    seen = engine.containers.run(
        IMAGE,
        ["sha256sum", "/models/sub/chat-1.gguf"],
        entrypoint="",
        user="65534",
        remove=True,
        name=f"{prefix}-reader",
        volumes={prefix: {"bind": "/models", "mode": "ro"}},
    )
    assert seen.decode().split()[0] == shards[0]["sha256"]

    assert task(check=True, name=prefix, state="absent").changed
    assert engine.volumes.get(prefix)
    assert task(name=prefix, state="absent").changed
    assert not engine.volumes.list(filters={"name": prefix})
    assert not task(name=prefix, state="absent").changed


def test_a_second_run_on_a_gigabyte_hashes_nothing(engine, prefix, task, tmp_path):
    path = tmp_path / "large.gguf"
    digest = write(path, 1024 * MIB)
    want = {"name": prefix, "files": [{"name": "large.gguf", "path": str(path), "sha256": digest}]}
    assert task(**want).hashed_bytes == 1024 * MIB
    path.unlink()
    path.touch()
    with path.open("r+b") as handle:
        handle.truncate(1024 * MIB)
    again = task(**want)
    assert (again.changed, again.hashed_bytes) == (False, 0)


def module_at_work(name: str, mark: str = "AnsiballZ_model_volume") -> list[int]:
    """The processes of the module that have this volume's files open."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (process / "cmdline").read_text() and any(
                f"/{name}/_data" in str(handle.readlink()) for handle in (process / "fd").iterdir()
            ):
                found.append(int(process.name))
    return found


def test_a_copy_killed_midway_goes_on(engine, prefix, task, tmp_path):
    path = tmp_path / "large.gguf"
    size = 600 * MIB
    digest = write(path, size)
    want = {"name": prefix, "files": [{"name": "large.gguf", "path": str(path), "sha256": digest}]}

    def kill(_process):
        for _attempt in range(3000):
            for pid in module_at_work(prefix):
                part = mountpoint(engine, prefix) / ".large.gguf.part"
                if part.exists() and part.stat().st_size > 50 * MIB:
                    os.kill(pid, signal.SIGKILL)
                    return
            time.sleep(0.01)

    killed = task(kill=kill, **want)
    assert killed.failed
    assert "model_volume ended without an answer: its process on the node is gone" in killed.msg
    directory = mountpoint(engine, prefix)
    assert not (directory / "large.gguf").exists()
    there = (directory / ".large.gguf.part").stat().st_size
    assert 50 * MIB < there < size

    planned = task(check=True, **want)
    assert planned.files[0]["bytes"] == size - there
    resumed = task(**want)
    assert resumed.fetched_bytes == size - there
    assert resumed.hashed_bytes == size
    assert [one.name for one in sorted(directory.iterdir())] == [".large.gguf.sha256.json", "large.gguf"]
    assert (tmp_path / "async").is_dir()
    assert not list((tmp_path / "async").glob("progress-*"))


def test_a_controller_that_goes_away_leaves_the_work_to_the_node(engine, prefix, task, tmp_path):
    path = tmp_path / "large.gguf"
    size = 600 * MIB
    digest = write(path, size)
    want = {"name": prefix, "files": [{"name": "large.gguf", "path": str(path), "sha256": digest}]}

    def kill(process):
        for _attempt in range(3000):
            if module_at_work(prefix):
                process.send_signal(signal.SIGKILL)
                return
            time.sleep(0.01)

    task(kill=kill, **want)
    # Another run meanwhile waits for the first, or finds its work done.
    again = task(**want)
    assert not again.failed
    assert hashlib.sha256((mountpoint(engine, prefix) / "large.gguf").read_bytes()).hexdigest() == digest
    assert task(**want).changed is False


def test_a_wrong_digest_keeps_the_old_file(engine, prefix, task, tmp_path):
    old, new = tmp_path / "old.gguf", tmp_path / "new.gguf"
    old_digest, new_digest = write(old, MIB), write(new, MIB)
    assert task(name=prefix, files=[{"name": "chat.gguf", "path": str(old), "sha256": old_digest}]).changed
    failed = task(name=prefix, files=[{"name": "chat.gguf", "path": str(new), "sha256": "0" * 64}])
    assert failed.failed
    assert f"SHA-256 {new_digest}, declared is {'0' * 64}" in failed.msg
    assert (mountpoint(engine, prefix) / "chat.gguf").read_bytes() == old.read_bytes()
    corrected = task(name=prefix, files=[{"name": "chat.gguf", "path": str(new), "sha256": new_digest}])
    assert (corrected.changed, corrected.fetched_bytes) == (True, 0)
    assert (mountpoint(engine, prefix) / "chat.gguf").read_bytes() == new.read_bytes()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 MiB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(directory)], check=False).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def test_a_full_disk(tmp_path, small_disk):
    """Told before the first byte, and when the space goes to somebody else meanwhile; continued when there is room."""
    path = tmp_path / "large.gguf"
    digest = write(path, 80 * MIB)
    wanted = Wanted("large.gguf", "path", str(path), digest)
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    with pytest.raises(ModelFilesError) as error:
        Store(str(small_disk)).check_space([wanted])
    assert f"{80 * MIB} bytes are still to be written, {free} bytes are free" in str(error.value)

    with pytest.raises(ModelFilesError, match=f"{small_disk} is full: [0-9]+ bytes of this file are written and kept"):
        Store(str(small_disk)).fetch(wanted)
    kept = (small_disk / ".large.gguf.part").stat().st_size
    assert kept > 50 * MIB
    subprocess.run(["mount", "-o", "remount,size=128m", str(small_disk)], check=True)
    store = Store(str(small_disk))
    store.fetch(wanted)
    assert store.fetched_bytes == 80 * MIB - kept
    assert (small_disk / "large.gguf").stat().st_size == 80 * MIB


def test_more_than_the_disk_holds_is_refused_by_the_module(prefix, task):
    failed = task(name=prefix, files=[{"name": "huge.gguf", "url": "http://127.0.0.1:9/huge.gguf", "size": 1 << 50}])
    assert failed.failed
    assert re.search(
        rf"Not enough space in .*{prefix}/_data: {1 << 50} bytes are still to be written, [0-9]+ ", failed.msg
    )


def test_a_library_is_shown_read_only_and_never_touched(engine, prefix, task, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for directory in (one, two):
        directory.mkdir()
        (directory / "theirs.gguf").write_text(directory.name)
    assert task(check=True, name=prefix, library=str(one)).changed
    made = task(name=prefix, library=str(one))
    assert (made.changed, made.volume["library"]) == (True, str(one))
    assert not task(name=prefix, library=str(one)).changed

    holder = engine.containers.run(
        IMAGE,
        ["sleep", "300"],
        entrypoint="",
        detach=True,
        name=f"{prefix}-holder",
        init=True,
        volumes={prefix: {"bind": "/models", "mode": "rw"}},
    )
    assert holder.exec_run(["cat", "/models/theirs.gguf"]).output == b"one"
    refused = holder.exec_run(["sh", "-c", "echo x > /models/mine.gguf"])
    assert refused.exit_code != 0
    assert b"Read-only file system" in refused.output

    for check in (True, False):
        busy = task(check=check, name=prefix, library=str(two))
        assert busy.failed
        assert f"cannot be replaced: it is used by container {prefix}-holder" in busy.msg
    holder.stop(timeout=0)
    assert f"cannot be removed: it is used by container {prefix}-holder" in task(name=prefix, state="absent").msg
    holder.remove()

    moved = task(name=prefix, library=str(two))
    assert moved.diff["before"]["library"] == str(one)
    assert moved.diff["after"]["library"] == str(two)
    assert engine.volumes.get(prefix).attrs["Options"]["device"] == str(two)
    assert task(name=prefix, state="absent").changed
    for directory in (one, two):
        assert [path.name for path in directory.iterdir()] == ["theirs.gguf"]
        assert (directory / "theirs.gguf").read_text() == directory.name


def test_a_library_that_is_not_there(prefix, task, tmp_path):
    assert "is not a directory on the node" in task(name=prefix, library=str(tmp_path / "nowhere")).msg


def test_foreign_volumes_are_left_alone(engine, prefix, task, tmp_path):
    write(tmp_path / "chat.gguf", MIB)
    engine.volumes.create(name=prefix)
    for options in (
        {"state": "absent"},
        {"files": [{"name": "chat.gguf", "path": str(tmp_path / "chat.gguf")}]},
        {"library": str(tmp_path)},
    ):
        refused = task(name=prefix, **options)
        assert refused.failed
        assert f"Docker volume {prefix} was not made by this collection" in refused.msg
    assert list(mountpoint(engine, prefix).iterdir()) == []


def test_from_a_url_with_progress_and_without_the_token(engine, prefix, task, tmp_path):
    """A slow server, so that there is progress to print; the token is in no output."""
    (tmp_path / "www").mkdir()
    path = tmp_path / "www" / "chat.gguf"
    digest = write(path, 30 * MIB)
    seen, commands = [], []

    class Slow(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(path.parent))

        def log_message(self, *_args):
            seen.append(self.headers.get("Authorization"))

        def copyfile(self, source, outputfile):
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    commands.append((process / "cmdline").read_text())
            while block := source.read(2 * MIB):
                outputfile.write(block)
                time.sleep(0.6)

    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        made = task(
            verbose=True,
            name=prefix,
            url_token="hf_verysecret",
            files=[{"name": "chat.gguf", "url": f"{url}/chat.gguf", "sha256": digest}],
        )
        missing = task(name=prefix, files=[{"name": "other.gguf", "url": f"{url}/other.gguf"}])
        server.shutdown()
    assert made.changed
    assert seen[0] == "Bearer hf_verysecret"
    assert "hf_verysecret" not in made.output
    assert any("AnsiballZ_model_volume" in one for one in commands)
    assert not any("hf_verysecret" in one for one in commands)
    assert re.search(r"\[localhost\] downloading chat.gguf \d+ % \(\d+ of 30 MiB", made.output)
    assert f"Download of {url}/other.gguf failed: HTTP 404 File not found. Check the URL." in missing.msg


def test_without_an_engine(prefix, task, tmp_path, monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nothing.sock")
    assert "the engine does not answer" in task(name=prefix).msg
    planned = task(check=True, name=prefix)
    assert planned.changed
    assert "taken for an engine without volumes" in planned.output


def test_without_the_sdk(prefix, task):
    python = next((one for one in ("/usr/bin/python3",) if Path(one).exists()), None)
    if (
        python is None
        or subprocess.run([python, "-c", "import docker"], check=False, capture_output=True).returncode == 0
    ):
        pytest.skip("this machine's own Python has the Docker SDK")
    variables = {"ansible_connection": "local", "ansible_python_interpreter": python}
    failed = task(name=prefix, variables=variables)
    assert failed.msg == (
        f"Docker volume {prefix} cannot be managed: the Docker SDK for Python is missing. Install python3-docker."
    )


@pytest.fixture
def node(engine, prefix, tmp_path):
    """A node that is reached over SSH as an ordinary user with sudo, and uses the engine of this machine."""
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    script = (
        "useradd -m -s /bin/bash owner; echo 'owner ALL=(ALL) NOPASSWD: ALL' > /etc/sudoers.d/owner;"
        f"install -d -o owner -m 700 ~owner/.ssh; echo '{key.with_suffix('.pub').read_text().strip()}' "
        "> ~owner/.ssh/authorized_keys; mkdir -p /run/sshd; exec /usr/sbin/sshd -D -e"
    )
    container = engine.containers.run(
        NODE_IMAGE,
        ["sh", "-c", script],
        entrypoint="",
        detach=True,
        name=f"{prefix}-node",
        volumes={
            "/var/run/docker.sock": {"bind": "/var/run/docker.sock"},
            "/var/lib/docker/volumes": {"bind": "/var/lib/docker/volumes"},
        },
    )
    container.reload()
    address = container.attrs["NetworkSettings"]["Networks"]["bridge"]["IPAddress"]
    variables = {
        "ansible_host": address,
        "ansible_user": "owner",
        "ansible_become": True,
        "ansible_ssh_private_key_file": str(key),
        "ansible_ssh_common_args": "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null",
        "ansible_python_interpreter": "/usr/bin/python3",
    }
    for _attempt in range(100):
        if b"listening" in container.logs():
            break
        time.sleep(0.1)
    yield container, variables
    container.remove(force=True, v=True)


def test_from_the_controller_over_ssh_and_sudo(engine, prefix, node, task, tmp_path):
    container, variables = node
    path = tmp_path / "chat.gguf"
    size = 300 * MIB
    digest = write(path, size)
    want = {"inventory": "node,", "variables": variables, "name": prefix}
    want["files"] = [{"name": "sub/chat.gguf", "controller_path": str(path), "sha256": digest}]
    planned = task(check=True, **want)
    assert [(one["action"], one["bytes"]) for one in planned.files] == [("fetch", size)]

    def cut(_process):
        """Cut the connection in the middle of a piece: what arrived stays, and the same run goes on."""
        for _attempt in range(3000):
            with contextlib.suppress(docker.errors.NotFound, FileNotFoundError):
                if (mountpoint(engine, prefix) / "sub/.chat.gguf.part").stat().st_size > 40 * MIB:
                    container.exec_run(["pkill", "-u", "owner", "-x", "sshd-session"])
                    return
            time.sleep(0.01)

    made = task(kill=cut, **want)
    assert made.changed
    assert made.files == [{"name": "sub/chat.gguf", "action": "fetch", "bytes": size, "sha256": digest}]
    assert made.fetched_bytes >= size
    assert made.diff == planned.diff
    directory = mountpoint(engine, prefix) / "sub"
    assert sorted(one.name for one in directory.iterdir()) == [".chat.gguf.sha256.json", "chat.gguf"]
    assert hashlib.sha256((directory / "chat.gguf").read_bytes()).hexdigest() == digest
    again = task(**want)
    assert (again.changed, again.hashed_bytes) == (False, 0)

    # Whoever repairs the node later may not have the file: good as it is there, it is not asked for.
    path.unlink()
    want["files"] = [{**want["files"][0], "size": size}]
    kept = task(**want)
    assert (kept.changed, kept.hashed_bytes) == (False, 0)
    with (directory / "chat.gguf").open("r+b") as handle:
        handle.write(b"damaged")
    lost = task(**want)
    assert lost.failed
    assert f"{path} is not on this machine. Run this where that file lies." in lost.msg


def test_a_controller_that_goes_away_while_sending(engine, prefix, node, task, tmp_path):
    _container, variables = node
    path = tmp_path / "chat.gguf"
    size = 300 * MIB
    digest = write(path, size)
    want = {"inventory": "node,", "variables": variables, "name": prefix}
    want["files"] = [{"name": "chat.gguf", "controller_path": str(path), "sha256": digest}]

    def kill(process):
        for _attempt in range(3000):
            with contextlib.suppress(docker.errors.NotFound, FileNotFoundError):
                if (mountpoint(engine, prefix) / ".chat.gguf.part").stat().st_size > 40 * MIB:
                    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                    for pid in (process.pid, *map(int, children)):
                        os.kill(pid, signal.SIGKILL)
                    return
            time.sleep(0.01)

    task(kill=kill, **want)
    directory = mountpoint(engine, prefix)
    assert not (directory / "chat.gguf").exists()
    assert (directory / ".chat.gguf.part").stat().st_size > 40 * MIB
    resumed = task(**want)
    assert 0 < resumed.fetched_bytes < size - 40 * MIB
    assert hashlib.sha256((directory / "chat.gguf").read_bytes()).hexdigest() == digest
