# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The container of one model server: desired values, compared with the running ones, changed where they differ.

Docker fills in, sorts and renames what it is given. Both sides are therefore brought into one form, which holds only
what this collection owns, and only that form is compared.
"""

from __future__ import annotations

import calendar
import contextlib
import hashlib
import hmac
import os
import re
import secrets
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Callable

from ansible_collections.homelab.inference.plugins.module_utils import llama_server, probe

try:
    import docker
    import docker.errors
    import docker.utils
except ImportError:  # checked in connect()
    docker = None  # type: ignore[assignment]

try:
    from requests.exceptions import RequestException
except ImportError:  # comes with the Docker SDK

    class RequestException(Exception):  # type: ignore[no-redef]
        """Never raised."""


MANAGED = "homelab.inference.managed"
INSTANCE = "homelab.inference.instance"
CONFIG = "homelab.inference.config"
LABEL_KEY = Path("/etc/homelab-inference/label.key")
PREVIOUS = "-previous"
MIB = 1 << 20
DEVICE_KEYS = ("PathOnHost", "PathInContainer", "CgroupPermissions")
# The engine answers some calls only when it is done: creating a container from a large image, stopping a busy one.
ENGINE_TIMEOUT = 300
# llama-server's last line before it serves, and far more than it says before that with --verbosity 4.
LISTENS = b": listening on "
MAX_START_LOG = 4 * MIB

Values = dict[str, Any]
Report = Callable[..., None]


class ContainerError(Exception):
    """A container that is not as it should be: the sentence for the user, and the last lines of the log."""

    def __init__(self, message: str, log: list[str] | None = None, restored: bool | None = None) -> None:
        super().__init__(message)
        self.log = log or []
        self.restored = restored


@contextlib.contextmanager
def _engine(what: str) -> Iterator[None]:
    """Turn what the engine says into one sentence."""
    try:
        yield
    except docker.errors.APIError as error:
        raise ContainerError(f"{what} failed: {str(error.explanation or error).strip().rstrip('.')}.") from error
    except (docker.errors.DockerException, RequestException) as error:
        raise ContainerError(
            f"{what} failed: the Docker engine does not answer ({error}). Look at it with systemctl status docker."
        ) from error


def connect() -> Any:
    """The low-level client of the node's engine."""
    if docker is None:
        raise ContainerError("The Docker SDK for Python is missing on the node. Install the package python3-docker.")
    try:
        return docker.from_env(version="auto", timeout=ENGINE_TIMEOUT).api
    except (docker.errors.DockerException, RequestException) as error:
        host = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
        if "http+docker" in str(error):
            raise ContainerError(
                "The Docker SDK for Python on the node does not fit its requests. Take both from the distribution."
            ) from error
        raise ContainerError(
            f"The Docker engine at {host} cannot be reached: {_cause(error)}. "
            "Start it (systemctl start docker), or install it with the role docker_host."
        ) from error


def _cause(error: BaseException) -> str:
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return getattr(error, "strerror", None) or str(error)


def start_log(client: Any, name: str) -> tuple[dict[str, str], str]:
    """What a container is, as C({image_id, started_at}), and what it has said from its last start until it served.

    A server that has answered for weeks has a long log; it is not read beyond its start.
    """
    with _engine(f"Reading the log of container {name}"):
        container = client.inspect_container(name)
        started_at = container["State"]["StartedAt"]
        since = calendar.timegm(time.strptime(started_at[:19], "%Y-%m-%dT%H:%M:%S"))
        text, size = [], 0
        for piece in client.logs(name, stream=True, follow=False, since=since):
            text.append(piece)
            size += len(piece)
            if LISTENS in piece or size > MAX_START_LOG:
                break
    return {"image_id": container["Image"], "started_at": started_at}, b"".join(text).decode("utf-8", "replace")


def of_process(client: Any, name: str, devices: list[str], taken: Mapping[tuple[int, str], int]) -> dict[str, int]:
    """MiB that the processes of a container take of each of its NVIDIA cards.

    :param taken: MiB by process and card, as the driver says it.
    """
    with _engine(f"Looking at container {name}"):
        variables = _variables(client.inspect_container(name)["Config"].get("Env"))
        # The order in which the server counts its cards.
        uuids = variables.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if not taken or not devices or len(uuids) != len(devices):
            return {}
        listed = client.top(name, "-eo pid")
    pids = {int(row[0]) for row in listed["Processes"]}
    found: dict[str, int] = {}
    for (pid, uuid), size in taken.items():
        if pid in pids and uuid in uuids:
            device = devices[uuids.index(uuid)]
            found[device] = found.get(device, 0) + size
    return found


# ------------------------------------------------------------------------------------------------ values and comparison


def seal(path: str | None, check_mode: bool) -> str | None:
    """What stands in the container's label for a secret file: changes are seen, the content is not.

    The key never leaves the node, so that the label cannot be tried against guesses. Without key or file (a fresh node
    in check mode) the seal matches nothing.
    """
    if not path:
        return None
    try:
        content = Path(path).read_bytes()
        key = _label_key(create=not check_mode)
    except FileNotFoundError as error:
        if check_mode:
            return "not known yet"
        raise ContainerError(
            f"Reading the API key failed: {path} is missing on the node. Write it before the container is made."
        ) from error
    except OSError as error:
        raise ContainerError(f"Reading the API key failed: {error.filename}: {error.strerror}.") from error
    return hmac.new(key, content, hashlib.sha256).hexdigest()


def _label_key(create: bool) -> bytes:
    try:
        return LABEL_KEY.read_bytes()
    except FileNotFoundError:
        if not create:
            raise
    LABEL_KEY.parent.mkdir(0o755, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=LABEL_KEY.parent) as partial:
        partial.write(secrets.token_hex(32))
        partial.flush()
        with contextlib.suppress(FileExistsError):  # whoever comes second uses the first one's
            os.link(partial.name, LABEL_KEY)
    return _label_key(create=False)


def _variables(lines: list[str] | None) -> dict[str, str]:
    return dict(line.split("=", 1) for line in lines or [] if "=" in line)


def desired(instance: Mapping[str, Any], image: Mapping[str, Any] | None, sealed: str | None) -> Values:
    """The owned values that the instance asks for; without an image, less what only the image can tell."""
    access = llama_server.device_access(instance)
    check = llama_server.healthcheck(instance)
    mounts = [f"volume:{volume}:{target}:ro" for volume, target in _volumes(instance).items()]
    if instance["api_key_file"]:
        mounts.append(f"bind:{instance['api_key_file']}:{llama_server.API_KEY}:ro")
    config = (image or {}).get("Config") or {}
    program = config.get("Entrypoint") or ["llama-server"]
    values: Values = {
        "command": llama_server.command(instance, program),
        "labels": {**(instance["labels"] or {}), MANAGED: "true", INSTANCE: re.sub("^llamacpp-", "", instance["name"])},
        "mounts": sorted(mounts),
        "published_ports": [f"{instance['published_address']}:{instance['port']}:{instance['port']}/tcp"],
        "memory_mib": instance["memory_mib"] or 0,
        "cpus": float(instance["cpus"] or 0),
        "devices": [f"{path}:{path}:rwm" for path in access["devices"]],
        "device_requests": access["device_requests"],
        "group_add": access["group_add"],
        "restart_policy": "no",
        "healthcheck": {key.lower(): check[key] for key in ("Test", "Interval", "Timeout", "Retries")},
        "read_only": True,
        "tmpfs": {"/tmp": "rw,nosuid,nodev,size=256m"},
        "cap_drop": ["ALL"],
        "security_opts": ["no-new-privileges"],
        "cap_add": ["IPC_LOCK"] if llama_server.locks_memory(instance) else [],
        "stop_timeout": instance["stop_timeout"],
        "api_key": sealed,
        "image": image["Id"] if image else "not pulled yet",
    }
    if access["runtime"]:
        values["runtime"] = access["runtime"]
    if image is not None:
        values["entrypoint"] = llama_server.entrypoint(instance, program)
        values["env"] = _own(llama_server.environment(instance), _variables(config.get("Env")))
        values["labels"] = _own(values["labels"], config.get("Labels") or {})
    return values


def _volumes(instance: Mapping[str, Any]) -> dict[str, str]:
    """Where each volume is mounted."""
    several = llama_server.several(instance)
    if not several:
        return {instance["volume"]: llama_server.MODELS}
    return {model["volume"]: f"{llama_server.MODELS}/{model['volume']}" for model in several}


def observed(container: Mapping[str, Any], image: Mapping[str, Any] | None) -> Values:
    """The owned values of a container as docker inspect shows it; image is what it was made from, where that exists."""
    config, host = container["Config"], container["HostConfig"]
    of_image = (image or {}).get("Config") or {}
    labels = dict(config.get("Labels") or {})
    sealed = labels.pop(CONFIG, None)
    check = config.get("Healthcheck") or {}
    return {
        "command": list(config.get("Cmd") or []),
        "labels": _own(labels, of_image.get("Labels") or {}),
        "mounts": sorted(
            f"{mount.get('Type')}:{mount.get('Source')}:{mount.get('Target')}:{'ro' if mount.get('ReadOnly') else 'rw'}"
            for mount in host.get("Mounts") or []
        ),
        "published_ports": sorted(
            f"{binding.get('HostIp', '')}:{binding.get('HostPort', '')}:{port}"
            for port, bindings in (host.get("PortBindings") or {}).items()
            for binding in bindings or []
        ),
        "memory_mib": (host.get("Memory") or 0) // MIB,
        "cpus": round((host.get("NanoCpus") or 0) / 1e9, 4),
        "devices": sorted(":".join(device[key] for key in DEVICE_KEYS) for device in host.get("Devices") or []),
        "device_requests": [
            {
                "driver": request.get("Driver") or "",
                "count": request.get("Count") or 0,
                "device_ids": list(request.get("DeviceIDs") or []),
                "capabilities": [sorted(names) for names in request.get("Capabilities") or []],
            }
            for request in host.get("DeviceRequests") or []
        ],
        "group_add": sorted(host.get("GroupAdd") or []),
        "restart_policy": (host.get("RestartPolicy") or {}).get("Name") or "no",
        "healthcheck": {key.lower(): check.get(key) for key in ("Test", "Interval", "Timeout", "Retries")},
        "read_only": bool(host.get("ReadonlyRootfs")),
        "tmpfs": dict(host.get("Tmpfs") or {}),
        "cap_add": _capabilities(host.get("CapAdd")),
        "cap_drop": _capabilities(host.get("CapDrop")),
        "security_opts": sorted(re.sub("[:=]true$", "", option) for option in host.get("SecurityOpt") or []),
        "stop_timeout": config.get("StopTimeout"),
        "api_key": sealed,
        "runtime": host.get("Runtime"),
        "image": container["Image"],
        "entrypoint": list(config.get("Entrypoint") or []),
        "env": _own(_variables(config.get("Env")), _variables(of_image.get("Env"))),
    }


def _capabilities(names: list[str] | None) -> list[str]:
    return sorted(re.sub("^CAP_", "", name.upper()) for name in names or [])


def _own(values: Mapping[str, str], of_image: Mapping[str, str]) -> dict[str, str]:
    """What was added to that of the image."""
    return {key: value for key, value in values.items() if of_image.get(key) != value}


def differences(before: Values, after: Values) -> list[str]:
    """The names of the owned values that differ, in a stable order."""
    return sorted(key for key in after if before.get(key) != after[key])


def body(values: Values, instance: Mapping[str, Any]) -> dict[str, Any]:
    """The request that makes a container of these values."""
    labels = dict(values["labels"])
    if values["api_key"]:
        labels[CONFIG] = values["api_key"]
    port = f"{instance['port']}/tcp"
    memory = values["memory_mib"] * MIB
    host: dict[str, Any] = {
        "Mounts": [_mount(mount) for mount in values["mounts"]],
        "PortBindings": {port: [{"HostIp": instance["published_address"], "HostPort": str(instance["port"])}]},
        "Memory": memory,
        # A model that swaps is worse than one that says it has no room.
        "MemorySwap": memory,
        "NanoCpus": int(values["cpus"] * 1e9),
        "Devices": [dict(zip(DEVICE_KEYS, device.split(":"))) for device in values["devices"]],
        "DeviceRequests": [
            {
                "Driver": request["driver"],
                "Count": request["count"],
                "DeviceIDs": request["device_ids"],
                "Capabilities": request["capabilities"],
            }
            for request in values["device_requests"]
        ],
        "GroupAdd": values["group_add"],
        "RestartPolicy": {"Name": values["restart_policy"]},
        "ReadonlyRootfs": values["read_only"],
        "Tmpfs": values["tmpfs"],
        "CapAdd": values["cap_add"],
        "CapDrop": values["cap_drop"],
        "SecurityOpt": values["security_opts"],
    }
    if values.get("runtime"):
        host["Runtime"] = values["runtime"]
    return {
        "Image": values["image"],
        "Entrypoint": values["entrypoint"],
        "Cmd": values["command"],
        "Env": [f"{key}={value}" for key, value in sorted(values["env"].items())],
        "Labels": labels,
        "ExposedPorts": {port: {}},
        "Healthcheck": llama_server.healthcheck(instance),
        "StopTimeout": values["stop_timeout"],
        "HostConfig": host,
    }


def _mount(mount: str) -> dict[str, Any]:
    kind, source, target, mode = mount.split(":")
    return {"Type": kind, "Source": source, "Target": target, "ReadOnly": mode == "ro"}


def shown(values: Values, reference: str, keys: list[str]) -> Values:
    """These values as a diff may show them: images by name, secrets not at all."""
    result = {key: values[key] for key in keys if values.get(key) not in (None, [], {})}
    if "image" in result:
        result["image"] = f"{reference} ({result['image'][:19]})"
    if "command" in result:
        # One line of the diff for one option and its value.
        result["command"] = re.sub(" (?=--)", "\n", " ".join(result["command"])).split("\n")
    if "api_key" in result:
        # The seal differs when the content does, and tells nothing else.
        result["api_key"] = f"sealed as {result['api_key'][:8]}"
    return result


# ------------------------------------------------------------------------------------------------------------ decisions


def recovery(current: bool, previous: bool, serves: bool, matches: bool) -> str:
    """How to end a replacement that was interrupted.

    restore: the successor was never made. keep: it serves, only the old one was left over. resume: it is the one that
    is wanted, but has not answered yet. discard: it never answered and is not wanted any more.
    """
    if not previous:
        return ""
    if not current:
        return "restore"
    if serves:
        return "keep"
    return "resume" if matches else "discard"


def actions(state: str, current: bool, differing: list[str], started: bool, recovering: str) -> list[str]:
    """What has to be done, in words that the result shows; nothing where all is well."""
    if state == "absent":
        return ["remove"] if current or recovering else []
    done = {"restore": ["restore previous"], "keep": ["remove previous"], "discard": ["restore previous"]}.get(
        recovering, []
    )
    if recovering == "resume":
        return ["start", "remove previous"] if state == "started" else ["remove previous"]
    if not current:
        done.append("create")
    elif differing:
        done.append("replace")
    if state == "started" and (not current or differing or not started):
        done.append("start")
    return done


# ----------------------------------------------------------------------------------------------------- who holds a port


def listeners(table: str) -> list[tuple[str, int, str]]:
    """(address, port, inode) of what listens, from the text of /proc/net/tcp or tcp6."""
    found = []
    for line in table.splitlines()[1:]:
        fields = line.split()
        if len(fields) < 10 or fields[3] != "0A":
            continue
        address, port = fields[1].split(":")
        if len(address) == 8:
            text = socket.inet_ntop(socket.AF_INET, struct.pack("=I", int(address, 16)))
        else:
            words = [int(address[index : index + 8], 16) for index in range(0, 32, 8)]
            text = socket.inet_ntop(socket.AF_INET6, struct.pack("=4I", *words))
        found.append((text, int(port, 16), fields[9]))
    return found


def _overlap(one: str, other: str) -> bool:
    everywhere = ("0.0.0.0", "::", "")
    return one in everywhere or other in everywhere or one == other


def _process_of(inode: str) -> str:
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(str(link.readlink()) == f"socket:[{inode}]" for link in (process / "fd").iterdir()):
                return f"process {(process / 'comm').read_text().strip()} (pid {process.name})"
    return "a process that does not show itself"


def port_holder(client: Any, instance: Mapping[str, Any]) -> str:
    """Who listens on the port that the instance wants, other than its own container; empty when nobody does."""
    address, port = instance["published_address"], instance["port"]
    with _engine("Listing the containers"):
        for container in client.containers():
            for published in container.get("Ports") or []:
                if published.get("PublicPort") == port and _overlap(published.get("IP", ""), address):
                    name = container["Names"][0].lstrip("/")
                    return "" if name == instance["name"] else f"container {name}"
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for listening, number, inode in listeners(Path(table).read_text()):
                if number == port and _overlap(listening, address):
                    return _process_of(inode)
    return ""


# ---------------------------------------------------------------------------------------------------------- starting it


class Direct:
    """Starts the container itself and waits until it answers."""

    def __init__(self, client: Any, instance: Mapping[str, Any], report: Report) -> None:
        self.client, self.instance, self.report = client, instance, report

    def started(self, container: Mapping[str, Any]) -> bool:
        """Whether it has been started; that it answers is for settle()."""
        return bool(container["State"]["Running"])

    def start(self) -> str:
        """Start it; the result says why it does not answer, and is empty when it does."""
        try:
            with _engine(f"Starting {self.instance['name']}"):
                self.client.start(self.instance["name"])
            return self._wait()
        except ContainerError as error:
            return str(error)

    def serves(self, container: Mapping[str, Any]) -> bool:
        """Whether it answers now, without waiting for it."""
        return self.started(container) and self._look()["state"] in probe.SERVING

    def settle(self) -> str:
        """Why a server that was started before does not answer. One that still loads is waited for."""
        found = self._look()
        if found["state"] in (probe.STARTING, probe.DOWN):
            return self._wait()
        return "" if found["state"] in probe.SERVING else f"{found['state']}: {found['evidence'][-1]}"

    def stop(self) -> None:
        """Stop it, with force when it does not end by itself."""
        with _engine(f"Stopping {self.instance['name']}"):
            self.client.stop(self.instance["name"], timeout=self.instance["stop_timeout"])

    def journal(self) -> list[str]:
        """Nobody else has written about this start."""
        return []

    def _wait(self) -> str:
        begun, name = time.monotonic(), self.instance["name"]

        def alive() -> bool:
            self.report(f"waiting for {name}:", int(time.monotonic() - begun), self.instance["ready_timeout"], "s")
            with _engine(f"Inspecting {name}"):
                return bool(self.client.inspect_container(name)["State"]["Running"])

        url, mode = llama_server.url(self.instance), llama_server.mode(self.instance)
        found = probe.wait_ready(url, self.instance["ready_timeout"], mode, alive, self._key())
        return "" if found["ready"] else "; ".join(found["evidence"][-2:])

    def _look(self) -> dict[str, Any]:
        endpoint = {"url": llama_server.url(self.instance), "timeout": 20.0, "kind": "llamacpp"}
        return probe.probe({**endpoint, "mode": llama_server.mode(self.instance), "api_key": self._key()})

    def _key(self) -> str | None:
        if not self.instance["api_key_file"]:
            return None
        lines = Path(self.instance["api_key_file"]).read_text().splitlines()
        keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        return keys[0] if keys else None


class Unit(Direct):
    """Leaves starting, waiting and the start lock to a systemd unit, and waits for what it says."""

    def started(self, container: Mapping[str, Any]) -> bool:
        """Whether unit and container agree that it runs."""
        return bool(container["State"]["Running"]) and self._ask("is-active") == "active"

    def start(self) -> str:
        """Start the unit, or wait for the start that is under way."""
        unit = self.instance["unit"]
        # A unit that has failed too often refuses to start until its count is set back.
        self._run("reset-failed", unit)
        verb = "restart" if self._ask("is-active") == "active" else "start"
        begun = time.monotonic()
        with self._popen(verb, unit) as process:
            while True:
                try:
                    text = process.communicate(timeout=2)[0]
                    break
                except subprocess.TimeoutExpired:
                    status = self._ask("show", "--property=StatusText", "--value") or f"waiting for {unit}"
                    self.report(f"{status}:", int(time.monotonic() - begun), None, "s")
        if process.returncode == 0:
            return ""
        written = self.journal()
        return written[-1] if written else text.strip()

    def serves(self, container: Mapping[str, Any]) -> bool:
        """The unit is active only from the first answer of its server on."""
        return self.started(container)

    def settle(self) -> str:
        """Nothing to wait for: see serves()."""
        return ""

    def stop(self) -> None:
        """Stop the unit, and the container where the unit did not run it."""
        process = self._run("stop", self.instance["unit"])
        if process.returncode not in (0, 5):  # 5: there is no such unit
            raise ContainerError(f"Stopping the unit {self.instance['unit']} failed: {process.stdout.strip()}.")
        super().stop()

    def journal(self) -> list[str]:
        """What the program of the unit wrote last; what systemd adds to that says less."""
        try:
            # AnsibleModule.run_command has no time limit.
            process = subprocess.run(  # pylint: disable=ansible-bad-function
                ["journalctl", f"_SYSTEMD_UNIT={self.instance['unit']}", "--lines=15", "--output=cat", "--no-pager"],
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=30, check=False,
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError):
            return []
        return process.stdout.splitlines()

    def _ask(self, verb: str, *options: str) -> str:
        return self._run(verb, *options, self.instance["unit"]).stdout.strip()

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        with self._popen(*arguments) as process:
            output = process.communicate()[0]
        return subprocess.CompletedProcess(process.args, process.returncode, output)

    def _popen(self, *arguments: str) -> subprocess.Popen[str]:
        try:
            # AnsibleModule.run_command says nothing while it waits, and a start may take as long as a model loads.
            return subprocess.Popen(  # pylint: disable=ansible-bad-function
                ["systemctl", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        except OSError as error:
            raise ContainerError(
                f"Calling systemctl for {self.instance['unit']} failed: {error.strerror}. "
                "Leave unit out where there is no systemd."
            ) from error


# ---------------------------------------------------------------------------------------------------------- the manager


class Manager:
    """Brings the container of one instance into its state."""

    def __init__(self, client: Any, instance: Mapping[str, Any], check_mode: bool, report: Report) -> None:
        self.client, self.instance, self.check_mode, self.report = client, instance, check_mode, report
        self.name: str = instance["name"]
        self.previous_name = self.name + PREVIOUS
        self.starter: Direct = (Unit if instance["unit"] else Direct)(client, instance, report)
        self.actions: list[str] = []
        self.warnings: list[str] = []
        self.before: Values = {}
        self.after: Values = {}

    def run(self) -> dict[str, Any]:
        """Do what is needed (in check mode: say it), and return the result of the module."""
        if self.instance["state"] == "absent":
            self._absent()
        else:
            llama_server.check(self.instance)
            self._present()
        diff = {"before": self.before, "after": self.after}
        result: dict[str, Any] = {"changed": bool(self.actions), "actions": self.actions, "diff": diff}
        final = self._inspect(self.name) if self.client else None
        if final and self._ours(final):
            state = final["State"]
            result["container"] = {
                "id": final["Id"],
                "name": self.name,
                "image": final["Config"]["Image"],
                "image_id": final["Image"],
                "status": state["Status"],
                "started_at": state["StartedAt"],
            }
        if self.instance["state"] == "started":
            result["url"] = llama_server.url(self.instance)
        return result

    def _absent(self) -> None:
        if not self.client:
            return
        found = {name: self._inspect(name) for name in (self.name, self.previous_name)}
        for name, container in found.items():
            if container and not self._ours(container):
                self.warnings.append(f"Container {name} was not made by this collection and stays.")
        mine = [name for name, container in found.items() if container and self._ours(container)]
        if not mine:
            return
        self.actions = actions("absent", True, [], False, "")
        self.before = {"container": mine}
        if self.check_mode:
            return
        if self.name in mine:
            self.report(f"stopping {self.name}")
            self.starter.stop()
        for name in mine:
            self._remove(name)

    def _present(self) -> None:
        state = self.instance["state"]
        current, previous = self._inspect(self.name), self._inspect(self.previous_name)
        if current and not self._ours(current):
            raise ContainerError(
                f"Making the container {self.name} failed: one of that name exists which this collection did not make "
                f"(image {current['Config']['Image']}). Rename or remove it, or give this server another name."
            )
        image = self._image()
        after = desired(self.instance, image, seal(self.instance["api_key_file"], self.check_mode))
        differing = self._differing(current, after)
        if previous and not self._ours(previous):
            if differing or not current:
                raise ContainerError(
                    f"Replacing {self.name} failed: {self.previous_name} exists and was not made by this collection. "
                    "Rename or remove it."
                )
            previous = None
        serves = bool(previous and current and self.starter.serves(current))
        step = recovery(bool(current), bool(previous), serves, not differing)
        successor = current
        if step in ("restore", "discard"):
            current = previous
            differing = self._differing(current, after)
        started = bool(current and self.starter.started(current)) and step not in ("restore", "discard")
        self.actions += actions(state, bool(current), differing, started, step)
        self._show(current, differing, after)
        if self.check_mode:
            return
        if "create" in self.actions or "replace" in self.actions:
            self._check_ground()
        if step == "keep":
            self._remove(self.previous_name)
        elif step in ("restore", "discard"):
            if successor:
                self.starter.stop()
                self._remove(self.name)
            self._rename(self.previous_name, self.name)
        if "create" in self.actions:
            self._create(after)
            self._start_or_fail(fresh=True)
        elif "replace" in self.actions:
            # What an interrupted run had stopped was meant to run.
            running = bool(current and current["State"]["Running"])
            self._replace(after, was_running=running or step in ("restore", "discard"))
        elif step == "resume":
            self._finish_replacement(was_running=True)
        elif "start" in self.actions:
            self._start_or_fail(fresh=False)
        elif state == "started":
            trouble = self.starter.settle()
            if trouble:
                raise self._failure(trouble, since=None)

    # -- steps

    def _replace(self, after: Values, was_running: bool) -> None:
        self.report(f"stopping {self.name}")
        self.starter.stop()
        self._rename(self.name, self.previous_name)
        try:
            self._create(after)
        except ContainerError as error:
            raise self._back(error, was_running) from error
        self._finish_replacement(was_running)

    def _finish_replacement(self, was_running: bool) -> None:
        """Start the successor; only when it answers the old one goes, else the old one comes back."""
        if self.instance["state"] == "started":
            self.report(f"starting {self.name}")
            trouble = self.starter.start()
            if trouble:
                failure = self._failure(trouble, None)
                with contextlib.suppress(ContainerError):
                    self.starter.stop()
                raise self._back(failure, was_running)
        self._remove(self.previous_name)

    def _back(self, failure: ContainerError, was_running: bool) -> ContainerError:
        """Put the old container back in its place; the result is what to tell the user."""
        self.report(f"putting the previous {self.name} back")
        with contextlib.suppress(ContainerError):
            self._remove(self.name)
        self._rename(self.previous_name, self.name)
        if not was_running:
            return ContainerError(f"{failure} The previous container is back, stopped as it was.", failure.log, True)
        trouble = self.starter.start()
        if trouble:
            return ContainerError(
                f"{failure} The previous container is back, but does not answer: {trouble}.", failure.log, False
            )
        return ContainerError(f"{failure} The previous container serves again.", failure.log, True)

    def _start_or_fail(self, fresh: bool) -> None:
        if self.instance["state"] != "started":
            return
        begun = int(time.time())
        self.report(f"starting {self.name}")
        trouble = self.starter.start()
        if trouble:
            raise self._failure(trouble, None if fresh else begun)

    def _failure(self, trouble: str, since: int | None) -> ContainerError:
        """Why it does not serve, from its own log; what the waiting saw is said only where the log says nothing."""
        container = self._inspect(self.name)
        state = container["State"] if container else {}
        log = ""
        with contextlib.suppress(ContainerError), _engine(f"Reading the log of {self.name}"):
            log = self.client.logs(self.name, tail=400, since=since).decode("utf-8", "replace")
        # The node program says what this module is about to say, and where to look.
        trouble = re.sub(rf"^Starting {re.escape(self.name)}: |\. See: .*$|\.$", "", trouble)
        if "not ready within" in trouble:
            # It ran until then; whoever stopped it afterwards is not the reason.
            state = {"Running": True}
        why = llama_server.reason(log, state, self.instance)
        if state.get("Running"):
            why = f"{trouble} ({why})" if why else trouble
        why = why or trouble
        if state.get("Error") and "is taken" in why:
            holder = port_holder(self.client, self.instance)
            why += f" by {holder}" if holder else ""
        return ContainerError(f"Starting {self.name} failed: {why}.", llama_server.tail(log) or self.starter.journal())

    def _check_ground(self) -> None:
        """Whatever would make the new container fail is found while the old one still serves."""
        for volume in _volumes(self.instance):
            with _engine(f"Looking for the volume {volume}"):
                try:
                    self.client.inspect_volume(volume)
                except docker.errors.NotFound as error:
                    raise ContainerError(
                        f"Making the container {self.name} failed: the volume {volume} does not exist. "
                        "Fill it with model_volume first."
                    ) from error
        holder = port_holder(self.client, self.instance)
        if holder:
            raise ContainerError(
                f"Making the container {self.name} failed: port {self.instance['port']} of the node is taken by "
                f"{holder}. Stop that, or give this server another port."
            )

    # -- the engine

    def _image(self) -> dict[str, Any] | None:
        """The image to run, pulled when that is wanted; nothing when check mode cannot see it."""
        reference, pull = self.instance["image"], self.instance["pull"]
        if not self.client:
            self.actions.append("pull")
            return None
        image = self._inspect_image(reference)
        if image and pull != "always":
            return image
        if pull == "never":
            if self.check_mode:
                return None
            raise ContainerError(
                f"Making the container {self.name} failed: the image {reference} is not on the node. "
                "Load it, or let it be pulled."
            )
        if self.check_mode:
            if image and self._newest(reference, image):
                return image
            self.actions.append("pull")
            return None
        self._pull(reference)
        pulled = self._inspect_image(reference)
        if not pulled:
            raise ContainerError(f"Pulling the image {reference} failed: the engine does not have it afterwards.")
        if not image or pulled["Id"] != image["Id"]:
            self.actions.append("pull")
        return pulled

    def _newest(self, reference: str, image: Mapping[str, Any]) -> bool:
        with _engine(f"Asking the registry for {reference}"):
            digest = self.client.inspect_distribution(reference)["Descriptor"]["digest"]
        return any(known.endswith(f"@{digest}") for known in image.get("RepoDigests") or [])

    def _pull(self, reference: str) -> None:
        repository, tag = docker.utils.parse_repository_tag(reference)
        layers: dict[str, tuple[int, int]] = {}
        with _engine(f"Pulling the image {reference}"):
            for event in self.client.pull(repository, tag=tag or "latest", stream=True, decode=True):
                if event.get("error"):
                    cause = event["error"].strip()
                    raise ContainerError(f"Pulling the image {reference} failed: {cause}. Check name and registry.")
                detail = event.get("progressDetail") or {}
                if event.get("status") == "Downloading" and detail.get("total"):
                    layers[event["id"]] = (detail["current"], detail["total"])
                done, total = (sum(numbers) for numbers in zip(*layers.values())) if layers else (None, None)
                self.report(f"pulling {reference}", done, total, "bytes")

    def _inspect_image(self, reference: str) -> dict[str, Any] | None:
        with _engine(f"Inspecting the image {reference}"):
            try:
                return self.client.inspect_image(reference)
            except docker.errors.NotFound:
                return None

    def _inspect(self, name: str) -> dict[str, Any] | None:
        if not self.client:
            return None
        with _engine(f"Inspecting the container {name}"):
            try:
                return self.client.inspect_container(name)
            except docker.errors.NotFound:
                return None

    @staticmethod
    def _ours(container: Mapping[str, Any]) -> bool:
        return (container["Config"].get("Labels") or {}).get(MANAGED) == "true"

    def _observed(self, container: Mapping[str, Any]) -> Values:
        return observed(container, self._inspect_image(container["Image"]))

    def _differing(self, current: Mapping[str, Any] | None, after: Values) -> list[str]:
        return differences(self._observed(current), after) if current else []

    def _show(self, current: Mapping[str, Any] | None, differing: list[str], after: Values) -> None:
        if not self.actions:
            return
        keys = differing if current else sorted(after)
        if current:
            self.before = shown(self._observed(current), current["Config"]["Image"], keys)
        self.after = shown(after, self.instance["image"], keys)
        if "start" in self.actions:
            self.before["running"], self.after["running"] = bool(current and self.starter.started(current)), True

    def _create(self, after: Values) -> None:
        with _engine(f"Making the container {self.name}"):
            self.client.create_container_from_config(
                {**body(after, self.instance), "Image": self.instance["image"]}, self.name
            )

    def _rename(self, old: str, new: str) -> None:
        with _engine(f"Renaming {old}"):
            self.client.rename(old, new)

    def _remove(self, name: str) -> None:
        with _engine(f"Removing the container {name}"), contextlib.suppress(docker.errors.NotFound):
            self.client.remove_container(name, force=True)
