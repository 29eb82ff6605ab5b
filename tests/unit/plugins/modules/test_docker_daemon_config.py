# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
import subprocess
import time

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.homelab.inference.plugins.modules import docker_daemon_config

WANTED = {
    "settings": {"log-driver": "json-file", "live-restore": True},
    "additions": {"insecure-registries": ["192.0.2.10:5000"]},
}


@pytest.fixture
def host(tmp_path, monkeypatch, capsys):
    """Runs the module on files of its own, with no engine of this machine in sight."""
    monkeypatch.setattr(docker_daemon_config, "PIDFILE", tmp_path / "docker.pid")

    class Host:
        file = tmp_path / "docker" / "daemon.json"
        record = tmp_path / "state" / "docker-daemon.json"

        def run(self, check=False, **params):
            args = {
                "path": str(self.file),
                "record_path": str(self.record),
                "_ansible_check_mode": check,
                "_ansible_remote_tmp": str(tmp_path),
                **params,
            }
            with patch_module_args(args), pytest.raises(SystemExit):
                docker_daemon_config.main()
            return json.loads(capsys.readouterr().out)

        def config(self):
            return json.loads(self.file.read_text())

        def owner(self, text):
            self.file.parent.mkdir(exist_ok=True)
            self.file.write_text(text)

    return Host()


@pytest.fixture
def engine(tmp_path):
    """A process that is called dockerd and notes when it is told to read its configuration again."""
    script = tmp_path / "dockerd"
    signals = tmp_path / "signals"
    script.write_text(f"#!/bin/sh\ntrap 'echo reload >>{signals}' HUP\nwhile :; do sleep 0.05; done\n")
    script.chmod(0o755)
    processes = []

    def start():
        for process in processes:
            process.kill()
            process.wait()
        processes.append(subprocess.Popen([str(script)]))
        (tmp_path / "docker.pid").write_text(str(processes[-1].pid))
        time.sleep(0.2)

        def reloads():
            """How often the process was told, once it has had the time to notice."""
            end = time.monotonic() + 5
            while not signals.exists() and time.monotonic() < end:
                time.sleep(0.02)
            return signals.read_text().count("reload")

        return reloads

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_a_fresh_host(host):
    planned = host.run(check=True, **WANTED)
    assert planned["changed"]
    assert not host.file.exists()
    assert not host.record.exists()
    done = host.run(**WANTED)
    assert done["diff"] == planned["diff"]
    assert host.config() == {
        "log-driver": "json-file",
        "live-restore": True,
        "insecure-registries": ["192.0.2.10:5000"],
    }
    assert not host.run(**WANTED)["changed"]
    assert host.run(state="absent")["changed"]
    assert not host.file.exists()
    assert not host.record.exists()
    assert not host.run(state="absent")["changed"]


def test_the_owners_file_comes_back_as_it_was(host):
    text = '{\n    "data-root": "/srv/docker",\n    "insecure-registries": [\n        "nas:5000"\n    ]\n}\n'
    host.owner(text)
    host.file.chmod(0o640)
    host.run(**WANTED)
    assert host.config()["data-root"] == "/srv/docker"
    assert host.file.stat().st_mode & 0o777 == 0o640
    host.run(state="absent")
    assert host.file.read_text() == text


def test_a_broken_file_is_refused_and_stays(host):
    host.owner('{"data-root": "/srv/docker",}')
    result = host.run(**WANTED)
    assert result["failed"]
    assert str(host.file) in result["msg"]
    assert host.file.read_text() == '{"data-root": "/srv/docker",}'
    assert not host.record.exists()


def test_a_link_stays_a_link(host, tmp_path):
    real = tmp_path / "elsewhere.json"
    real.write_text("{}")
    host.file.parent.mkdir()
    host.file.symlink_to(real)
    host.run(**WANTED)
    assert host.file.is_symlink()
    assert json.loads(real.read_text())["live-restore"] is True


def test_the_diff_shows_no_key_of_the_owner(host):
    host.owner('{"proxies": {"http-proxy": "http://user:hidden@192.0.2.1:3128"}}')
    assert "hidden" not in json.dumps(host.run(**WANTED))


def test_addition_of_a_scalar_is_refused(host):
    result = host.run(additions={"insecure-registries": "nas:5000"})
    assert result["failed"]
    assert "insecure-registries" in result["msg"]


def test_a_restart_is_asked_for_until_it_happened(host, engine):
    reloads = engine()
    first = host.run(**WANTED)
    assert first["restart_keys"] == ["log-driver"]
    again = host.run(**WANTED)
    assert not again["changed"]
    assert again["restart_required"]
    assert reloads() == 1
    engine()
    after = host.run(**WANTED)
    assert not after["changed"]
    assert not after["restart_required"]


def test_what_the_engine_takes_over_needs_no_restart(host, engine):
    reloads = engine()
    result = host.run(settings={"live-restore": True})
    assert not result["restart_required"]
    assert reloads() == 1
    assert host.run(state="absent")["restart_keys"] == ["live-restore"]
