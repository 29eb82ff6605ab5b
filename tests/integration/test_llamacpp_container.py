# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""llamacpp_container on a real engine, with real llama-servers and a small real model."""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

BUILT = "homelab-inference/llama.cpp:dev"
REGISTRY = "homelab-inference/registry:bookworm"
ROOT = Path(__file__).parents[2]
PREFIX = f"lct-{secrets.token_hex(3)}"
# A name of this run's own: the image may be built anew meanwhile.
IMAGE = f"{PREFIX}:1"
RPC_SERVER = "/usr/libexec/x86_64-linux-gnu/llama/bin/ggml-rpc-server"


def docker(*args, check=True, stderr=False):
    done = subprocess.run(["docker", *args], capture_output=True, text=True, timeout=120, check=False)
    if check and done.returncode:
        raise AssertionError(f"docker {' '.join(args)}: {done.stderr}")
    return (done.stdout + (done.stderr if stderr else "")).strip()


def inspect(name):
    return json.loads(docker("inspect", name))[0]


def exists(name):
    return bool(docker("ps", "-aq", "--filter", f"name=^{name}$"))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def get(url, key=None):
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture(scope="module", autouse=True)
def image():
    docker("tag", BUILT, IMAGE)
    yield
    docker("rmi", IMAGE, check=False)


@pytest.fixture(scope="module")
def volume(tmp_path_factory):
    """A volume with a model, and with two files that only look like one."""
    folder = tmp_path_factory.mktemp("models")
    subprocess.run([sys.executable, ROOT / "tests/images/model/build.py", folder], check=True, capture_output=True)
    (folder / "half.gguf").write_bytes((folder / "chat.gguf").read_bytes()[:200_000])
    name = f"{PREFIX}-models"
    docker("volume", "create", name)
    copy = f"{PREFIX}-copy"
    docker("create", "--name", copy, "-v", f"{name}:/models", IMAGE, "true")
    docker("cp", f"{folder}/.", f"{copy}:/models")
    docker("rm", copy)
    yield name
    docker("volume", "rm", "-f", name)


@pytest.fixture(scope="module", autouse=True)
def label_key():
    """Leave the key of this machine as it was."""
    path = Path("/etc/homelab-inference/label.key")
    folder, key = path.parent.exists(), path.exists()
    yield
    if not key:
        path.unlink(missing_ok=True)
    if not folder and path.parent.exists():
        path.parent.rmdir()


class Server:
    """One instance under test, by its options."""

    def __init__(self, tmp_path, volume):
        self.tmp_path = tmp_path
        self.name = f"{PREFIX}-{secrets.token_hex(3)}"
        self.port = free_port()
        self.options = {
            "name": self.name,
            "image": IMAGE,
            "volume": volume,
            "model_file": "chat.gguf",
            "alias": "chat",
            "port": self.port,
            "cpus": 1,
            "memory_mib": 500,
            "server_options": {"ctx-size": 512, "parallel": 1},
            "ready_timeout": 60,
            "stop_timeout": 5,
        }

    def wanted(self, changes):
        return {key: value for key, value in {**self.options, **changes}.items() if value is not None}

    def run(self, check=False, environment=None, **changes):
        """The module as the node runs it; its result."""
        options = {**self.wanted(changes), "_ansible_check_mode": check, "_ansible_diff": True}
        done = subprocess.run(
            [sys.executable, "-m", "ansible_collections.homelab.inference.plugins.modules.llamacpp_container"],
            input=json.dumps({"ANSIBLE_MODULE_ARGS": options}),
            env={**os.environ, "PYTHONPATH": str(ROOT / ".cache"), **(environment or {})},
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        if not done.stdout:
            raise AssertionError(done.stderr)
        return {**json.loads(done.stdout), "rc": done.returncode, "output": done.stdout + done.stderr}

    def task(self, *args, rc=0, **changes):
        """A task as a user runs it, through the action plugin; what is printed."""
        done = subprocess.run(
            [str(Path(sys.executable).with_name("ansible")), "localhost", "-i", "localhost,", "-c", "local", "--diff"]
            + ["-e", f"ansible_python_interpreter={sys.executable}"]
            + ["-m", "homelab.inference.llamacpp_container", "-a", json.dumps(self.wanted(changes)), *args],
            cwd=ROOT,
            env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")},
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.returncode == rc, done.stdout + done.stderr
        return done.stdout + done.stderr

    def ok(self, **changes):
        result = self.run(**changes)
        assert result["rc"] == 0, result["output"]
        return result

    def fails(self, **changes):
        result = self.run(**changes)
        assert result["rc"] != 0, result["output"]
        return result

    def started_at(self):
        return inspect(self.name)["State"]["StartedAt"]

    def answers(self):
        return get(f"http://127.0.0.1:{self.port}/health") == 200


@pytest.fixture
def server(tmp_path, volume):
    server = Server(tmp_path, volume)
    yield server
    docker("rm", "-f", server.name, f"{server.name}-previous", check=False)


def test_do_do_again_change(server):
    foreseen = server.ok(check=True)
    assert foreseen["changed"]
    assert foreseen["actions"] == ["create", "start"]
    assert not exists(server.name)

    made = server.ok()
    assert made["actions"] == foreseen["actions"]
    assert made["diff"] == foreseen["diff"]
    assert server.answers()

    started_at = server.started_at()
    again = server.ok()
    assert not again["changed"]
    assert server.started_at() == started_at

    options = {"ctx-size": 256, "parallel": 1}
    foreseen = server.ok(check=True, server_options=options)
    changed = server.ok(server_options=options)
    assert foreseen["actions"] == changed["actions"] == ["replace", "start"]
    assert foreseen["diff"] == changed["diff"]
    assert set(changed["diff"]["before"]) == {"command", "running"}
    assert "--ctx-size 512" in changed["diff"]["before"]["command"]
    assert "--ctx-size 256" in changed["diff"]["after"]["command"]
    assert server.answers()
    assert not exists(f"{server.name}-previous")
    assert not server.ok(check=True, server_options=options)["changed"]

    gone = server.ok(state="absent")
    assert gone["changed"]
    assert not exists(server.name)
    assert not server.ok(state="absent")["changed"]
    assert docker("volume", "ls", "-q", "--filter", f"name={server.options['volume']}")


CARD = {"id": "gpu0", "vendor": "nvidia", "uuid": "GPU-0", "memory_mib": 16384}
RADEON = {"id": "gpu0", "vendor": "amd", "devices": ["/dev/dri/card0"], "groups": [992, 44]}
CHANGES = {
    "alias": {"alias": "other"},
    "cpus": {"cpus": 0.5},
    "memory": {"memory_mib": 600},
    "no memory limit": {"memory_mib": None},
    "env": {"env": {"A": "b=c"}},
    "labels": {"labels": {"team": "x"}},
    "address": {"published_address": "0.0.0.0"},
    "mode": {"mode": "embedding"},
    "stop": {"stop_timeout": 7},
    "mlock": {"server_options": {"load-mode": "mlock"}},
    "cuda": {"backend": "cuda", "devices": [CARD]},
    "rocm": {"backend": "rocm", "devices": [RADEON]},
    "vulkan": {"backend": "vulkan", "devices": [CARD]},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_each_option_is_read_back_as_it_was_written(server, change):
    server.ok(state="present")
    changed = server.ok(state="present", **change)
    assert changed["changed"]
    assert changed["actions"] == ["replace"]
    assert not server.ok(state="present", **change)["changed"]
    assert server.ok(check=True, state="present")["actions"] == ["replace"]


def test_the_wait_alone_replaces_nothing(server):
    server.ok(state="present")
    assert not server.ok(state="present", ready_timeout=61)["changed"]


def test_the_container_may_do_little(server):
    server.ok()
    found = inspect(server.name)
    assert found["HostConfig"]["RestartPolicy"]["Name"] == "no"
    assert found["HostConfig"]["LogConfig"]["Config"] == {}
    assert docker("exec", server.name, "sh", "-c", "touch /x 2>&1 || true").endswith("Read-only file system")
    status = docker("exec", server.name, "cat", "/proc/1/status")
    assert {line.split()[1] for line in status.splitlines() if line.startswith("Cap")} == {"0" * 16}
    assert "NoNewPrivs:\t1" in status
    assert "docker.sock" not in json.dumps(found["HostConfig"])
    check = found["Config"]["Healthcheck"]["Test"]
    docker("exec", server.name, *check[1:])


def test_memory_may_be_locked_where_that_is_asked_for(server):
    """Whether it then is, the kernel decides: not in a user namespace, where CI may run."""
    options = {"load-mode": "mlock", "ctx-size": 256, "verbosity": 4}
    server.ok(server_options=options)
    assert "load_mode = mlock" in docker("logs", server.name, stderr=True)
    assert f"CapEff:\t{1 << 14:016x}" in docker("exec", server.name, "cat", "/proc/1/status")
    assert not server.ok(server_options=options)["changed"]


def test_a_moved_tag_replaces_the_container(server):
    tag = f"homelab-inference/{server.name}:1"
    docker("tag", IMAGE, tag)
    try:
        server.ok(image=tag)
        assert not server.ok(image=tag)["changed"]
        other = subprocess.run(
            ["docker", "build", "-q", "-t", tag, "-"], input=f'FROM {IMAGE}\nENV LAB=1\nENTRYPOINT ["llama-server"]\n',
            check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
        assert server.ok(check=True, image=tag)["actions"] == ["replace", "start"]
        changed = server.ok(image=tag)
        assert changed["container"]["image_id"] == other
        assert changed["diff"]["before"]["image"] != changed["diff"]["after"]["image"]
        assert server.answers()
        assert not server.ok(image=tag)["changed"]
        # The same image under another name is the same server.
        assert not server.ok(image=other)["changed"]
    finally:
        docker("rm", "-f", server.name, check=False)
        docker("rmi", "-f", tag)


def test_the_image_comes_from_a_registry_by_tag_and_by_digest(server):
    registry, port = f"{PREFIX}-registry", free_port()
    docker("run", "-d", "--name", registry, "-p", f"127.0.0.1:{port}:5000", REGISTRY)
    repository = f"127.0.0.1:{port}/llama.cpp"
    tag = f"{repository}:b1"
    try:
        end = time.monotonic() + 30
        docker("tag", IMAGE, tag)
        while "digest: " not in (pushed := docker("push", tag, check=False)):
            assert time.monotonic() < end, pushed
        digest = f"{repository}@{pushed.split('digest: ')[1].split()[0]}"
        docker("rmi", tag)
        assert server.ok(check=True, image=tag)["actions"] == ["pull", "create", "start"]
        assert server.ok(image=tag)["actions"] == ["pull", "create", "start"]
        assert server.ok(image=tag)["actions"] == []
        assert not server.ok(image=tag, pull="always")["changed"]
        assert not server.ok(image=digest)["changed"]

        build = ["docker", "build", "-q", "-t", tag, "-"]
        subprocess.run(build, input=f"FROM {IMAGE}\nENV LAB=2\n", check=True, capture_output=True, text=True)
        docker("push", tag)
        docker("tag", IMAGE, tag)
        assert not server.ok(image=tag)["changed"]
        foreseen = server.ok(check=True, image=tag, pull="always")
        assert foreseen["actions"] == server.ok(image=tag, pull="always")["actions"] == ["pull", "replace", "start"]
        assert not server.ok(check=True, image=tag, pull="always")["changed"]
        assert server.answers()
    finally:
        docker("rm", "-f", server.name, registry, check=False)
        names = docker("images", "--digests", "--format", "{{.Repository}}@{{.Digest}}", repository).split()
        docker("rmi", "-f", tag, *(name for name in names if "<none>" not in name), check=False)


def test_a_model_that_does_not_load_leaves_the_old_server(server):
    server.ok()
    old = inspect(server.name)
    for file, reason in (("half.gguf", "corrupt or incomplete"), ("none.gguf", "is not in the volume")):
        failed = server.fails(model_file=file)
        assert reason in failed["msg"]
        assert failed["msg"].endswith("The previous container serves again.")
        assert failed["restored"] is True
        assert any("failed to load model" in line for line in failed["log"])
        back = inspect(server.name)
        assert (back["Id"], back["Config"]["Cmd"]) == (old["Id"], old["Config"]["Cmd"])
        assert back["State"]["StartedAt"] > old["State"]["StartedAt"]
        assert server.answers()
        assert not exists(f"{server.name}-previous")
    assert not server.ok()["changed"]


def test_a_first_start_that_fails_says_why(server):
    failed = server.fails(server_options={"no-such-flag": 1})
    assert failed["msg"] == f"Starting {server.name} failed: this build does not know the option --no-such-flag."
    # What is left over is mended by the next run.
    assert server.ok()["actions"] == ["replace", "start"]
    assert server.answers()


def test_a_stopped_server_is_started_again(server):
    server.ok()
    docker("kill", server.name)
    assert server.ok(check=True)["actions"] == ["start"]
    assert server.ok()["actions"] == ["start"]
    assert server.answers()


def test_a_foreign_container_stays_as_it_is(server):
    docker("run", "-d", "--name", server.name, "--entrypoint", "sleep", IMAGE, "600")
    started_at = server.started_at()
    for check in (False, True):
        failed = server.fails(check=check)
        assert server.name in failed["msg"]
        assert "did not make" in failed["msg"]
    result = server.ok(state="absent")
    assert not result["changed"]
    assert f"Container {server.name} was not made by this collection and stays." in json.dumps(result["warnings"])
    assert server.started_at() == started_at


def test_a_taken_port_is_named_while_the_old_server_serves(server):
    server.ok()
    started_at = server.started_at()
    holder = f"{PREFIX}-holder"
    port = free_port()
    docker("run", "-d", "--name", holder, "-p", f"127.0.0.1:{port}:80", "--entrypoint", "sleep", IMAGE, "600")
    try:
        assert f"port {port} of the node is taken by container {holder}." in server.fails(port=port)["msg"]
    finally:
        docker("rm", "-f", holder)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        assert (
            f"is taken by process {Path(f'/proc/{os.getpid()}/comm').read_text().strip()}"
            in server.fails(port=port)["msg"]
        )
    assert server.started_at() == started_at


def test_the_key_is_asked_for_and_shown_nowhere(server, tmp_path):
    secret, other = f"sk-{secrets.token_hex(16)}", f"sk-{secrets.token_hex(16)}"
    key_file = tmp_path / "key"
    key_file.write_text(secret + "\n")
    key_file.chmod(0o600)
    assert "missing on the node" in server.fails(api_key_file=str(tmp_path / "none"))["msg"]
    assert server.ok(check=True, api_key_file=str(tmp_path / "none"))["changed"]
    server.ok()
    printed = server.task("-vvv", api_key_file=str(key_file))
    assert "replace" in printed
    url = f"http://127.0.0.1:{server.port}/v1/models"
    assert (get(url), get(url, secret), server.answers()) == (401, 200, True)
    assert not server.ok(api_key_file=str(key_file))["changed"]

    key_file.write_text(other + "\n")
    foreseen = server.ok(check=True, api_key_file=str(key_file))
    changed = server.ok(api_key_file=str(key_file))
    assert foreseen["actions"] == changed["actions"] == ["replace", "start"]
    assert foreseen["diff"] == changed["diff"]
    assert set(changed["diff"]["after"]) == {"api_key", "running"}
    assert (get(url, secret), get(url, other)) == (401, 200)
    shown = printed + changed["output"] + docker("inspect", server.name) + docker("top", server.name)
    assert secret not in shown
    assert other not in shown


def test_layers_go_to_an_emulated_gpu(server):
    devices = []
    names = [f"{server.name}-gpu{index}" for index in range(2)]
    try:
        for index, name in enumerate(names):
            docker("run", "-d", "--name", name, "--entrypoint", RPC_SERVER, IMAGE, "-H", "0.0.0.0", "-p", "50052")
            address = inspect(name)["NetworkSettings"]["IPAddress"]
            devices.append({"id": f"gpu{index}", "vendor": "emulated", "uuid": name, "endpoint": f"{address}:50052"})
        options = {"n-gpu-layers": 99, "tensor-split": [2, 1], "ctx-size": 256, "verbosity": 4}
        gpu = {"backend": "emulated", "devices": devices, "server_options": options}
        server.ok(**gpu)
        log = docker("logs", server.name, stderr=True)
        assert "offloaded 3/3 layers to GPU" in log
        assert all(f"RPC0[{device['endpoint']}] model buffer size" in log for device in devices)
        assert not server.ok(**gpu)["changed"]

        # The same where models take turns: each gets the cards when it is awake.
        model = {"volume": server.options["volume"], "model_file": "chat.gguf", "server_options": options}
        turns = {"models": [{**model, "alias": "one"}, {**model, "alias": "two"}], "backend": "emulated"}
        turns |= {"devices": devices, **dict.fromkeys(("volume", "model_file", "server_options", "alias"))}
        server.ok(**turns)
        assert chat(server, "two") == ("two", 4)
        log = docker("logs", server.name, stderr=True)
        assert log.count("offloaded 3/3 layers to GPU") == 2
        server.ok(**gpu)

        docker("kill", names[1])
        docker("kill", server.name)
        failed = server.fails(**gpu)
        assert f"the emulated GPU at {devices[1]['endpoint']} does not answer" in failed["msg"]
    finally:
        docker("rm", "-f", *names, check=False)


def test_a_card_that_is_not_there_stops_the_server(server):
    failed = server.fails(
        env={"A": "1"}, backend="rocm", devices=[{"id": "gpu0", "vendor": "amd", "devices": ["/dev/null"]}]
    )
    assert "the node has no /dev/kfd" in failed["msg"]


@pytest.mark.parametrize(
    "moment", ["before the successor", "the successor loads not", "after the successor", "nobody wants it"]
)
def test_an_interrupted_replacement_is_ended_by_the_next_run(server, moment):
    """Each state that a run leaves when it is killed, made by the same renames."""
    previous = f"{server.name}-previous"
    server.ok()
    docker("stop", "-t", "5", server.name)
    docker("rename", server.name, previous)
    new = {"alias": "new"}
    if moment == "before the successor":
        foreseen = server.ok(check=True, **new)
        done = server.ok(**new)
        assert foreseen["actions"] == done["actions"] == ["restore previous", "replace", "start"]
    else:
        docker("rename", previous, "aside-" + server.name)
        broken = {"model_file": "half.gguf"}
        if moment == "after the successor":
            server.ok(**new)
        elif moment == "nobody wants it":
            server.ok(state="present", **broken)
        else:
            server.ok(state="present", **new)
        docker("rename", "aside-" + server.name, previous)
        foreseen = server.ok(check=True, **new)
        done = server.ok(**new)
        assert foreseen["actions"] == done["actions"]
        expected = {
            "after the successor": ["remove previous"],
            "the successor loads not": ["start", "remove previous"],
            "nobody wants it": ["restore previous", "replace", "start"],
        }
        assert done["actions"] == expected[moment]
    assert server.answers()
    assert "new" in inspect(server.name)["Config"]["Cmd"]
    assert not exists(previous)
    assert not server.ok(**new)["changed"]


def test_a_resumed_replacement_that_fails_goes_back(server):
    previous = f"{server.name}-previous"
    server.ok()
    old = inspect(server.name)["Id"]
    docker("stop", "-t", "5", server.name)
    docker("rename", server.name, "aside-" + server.name)
    server.ok(state="present", model_file="half.gguf")
    docker("rename", "aside-" + server.name, previous)
    assert "serves again" in server.fails(model_file="half.gguf")["msg"]
    assert inspect(server.name)["Id"] == old
    assert server.answers()


def test_what_is_missing_is_said_before_anything_is_touched(server):
    server.ok()
    started_at = server.started_at()
    assert "the volume no-such-volume does not exist" in server.fails(volume="no-such-volume")["msg"]
    assert "is not on the node" in server.fails(image="homelab-inference/none:1", pull="never")["msg"]
    assert "Use the option port instead" in server.fails(server_options={"port": 1})["msg"]
    missing = "127.0.0.1:9/none/none:1"
    failed = server.fails(image=missing)
    assert failed["msg"].startswith(f"Pulling the image {missing} failed: ")
    foreseen = server.ok(check=True, image=missing)
    assert foreseen["actions"] == ["pull", "replace", "start"]
    assert server.started_at() == started_at


def test_without_an_engine(server):
    dead = {"DOCKER_HOST": f"unix://{server.tmp_path}/docker.sock"}
    failed = server.fails(environment=dead)
    assert failed["msg"] == (
        f"The Docker engine at {dead['DOCKER_HOST']} cannot be reached: No such file or directory. "
        "Start it (systemctl start docker), or install it with the role docker_host."
    )
    foreseen = server.ok(check=True, environment=dead)
    assert foreseen["actions"] == ["pull", "create", "start"]
    assert not server.ok(check=True, environment=dead, state="absent")["changed"]


def test_a_server_that_loads_is_waited_for_and_one_that_hangs_is_named(server):
    server.ok()
    docker("pause", server.name)
    try:
        begun = time.monotonic()
        failed = server.fails(ready_timeout=60)
        assert "HUNG" in failed["msg"]
        assert time.monotonic() - begun < 40
    finally:
        docker("unpause", server.name)
    assert not server.ok()["changed"]


def test_a_long_wait_is_shown_and_ends_at_its_deadline(server):
    """An image that starts and never answers, as a server that hangs while it loads."""
    silent = f"{PREFIX}-silent:1"
    recipe = f'FROM {IMAGE}\nENTRYPOINT ["sh", "-c", "echo loading; exec sleep 120"]\n'
    subprocess.run(
        ["docker", "build", "-q", "-t", silent, "-"], input=recipe, check=True, capture_output=True, text=True
    )
    try:
        server.ok()
        printed = server.task(image=silent, ready_timeout=12, rc=2)
        assert re.search(rf"\[localhost\] waiting for {server.name}: \d+ of 12 s", printed), printed
        assert "not ready within 12 s. The previous container serves again." in " ".join(printed.split())
        assert server.answers()
    finally:
        docker("rm", "-f", server.name, check=False)
        docker("rmi", "-f", silent, check=False)


def chat(server, model, tokens=4):
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": tokens, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        found = json.load(answer)
    return found["model"], found["usage"]["completion_tokens"]


def awake(server):
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/models", timeout=10) as answer:
        return {model["id"]: model["status"]["value"] for model in json.load(answer)["data"]}


def test_models_take_turns_and_no_answer_is_cut(server, volume):
    model = {"volume": volume, "model_file": "chat.gguf", "server_options": {"ctx-size": 4096, "parallel": 1}}
    turns = {
        "models": [{**model, "alias": "one"}, {**model, "alias": "two"}],
        **dict.fromkeys(("volume", "model_file", "server_options", "alias")),
    }
    done = server.ok(**turns)
    assert done["actions"] == ["create", "start"]
    assert awake(server) == {"one": "loaded", "two": "unloaded"}
    # The second is asked for while the first still writes: it waits, and the first is not cut.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        long = pool.submit(chat, server, "one", 3000)
        time.sleep(0.5)
        short = pool.submit(chat, server, "two")
        assert long.result() == ("one", 3000)
        assert short.result() == ("two", 4)
    assert awake(server) == {"one": "unloaded", "two": "loaded"}
    # There is never more than one of them.
    wanted = [pool_index % 2 for pool_index in range(12)]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda number: chat(server, ("one", "two")[number]), wanted))
    assert answers == [(("one", "two")[number], 4) for number in wanted]
    assert list(awake(server).values()).count("loaded") == 1
    # Again changes nothing, not even who is awake.
    now = awake(server)
    assert not server.ok(**turns)["changed"]
    assert awake(server) == now
    # Another model of the same name is another server; one that is broken leaves what runs.
    broken = {**turns, "models": [{**turns["models"][0], "model_file": "half.gguf"}, turns["models"][1]]}
    failed = server.fails(**broken)
    assert failed["restored"] is True
    assert "one failed to load" in failed["msg"] or "corrupt or incomplete" in failed["msg"]
    assert chat(server, "two") == ("two", 4)
    changed = server.ok(**{**turns, "models": turns["models"][:1]})
    assert changed["actions"] == ["replace", "start"]
    assert list(awake(server)) == ["one"]
