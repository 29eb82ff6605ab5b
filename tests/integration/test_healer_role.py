# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Role healer on a machine with systemd, Debian's webhook and a real Alertmanager.

A recovery is a script that notes it. Each test has nodes of its own, so that none waits for the cooldown of another.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from systemd_node import Node, until

from tests.sample import long

pytestmark = long

ROOT = Path(__file__).resolve().parents[2]
ANSIBLE = str(Path(sys.executable).with_name("ansible-playbook"))
SECRET = 'door-secret-"2718%d\\n{{281828}}'
CORE = "door-secret"
ODD = ["two words", "100% $HOME", 'a "quoted" \\ word']
NODES = [
    *("helium", "many", "pair-1", "pair.2", "resolved", "guarded", "alive", "cool", "spent", "spent-2", "slow"),
    *("failing", "by-hand", "spooled", "fired", "gateway", "kept-off", "waited"),
]
# It takes a moment, as a recovery does; one of node slow has a child and never ends, one of node failing fails.
RECORD = r"""#!/bin/sh
for word; do line="$line$word|"; done
printf '%s\n' "$line$(id -un) $(pwd) $LC_ALL $GREETING" >>/home/lab/recoveries
case $4 in
    *=slow) sleep 1111 & sleep 2222 ;;
    *=failing) exit 3 ;;
    *) sleep 1 ;;
esac
"""
UNITS = "Configure | Write the units"
OPENED = "Run | Open the door"
ANNOUNCED = "Run | Announce that the door would be opened with what was written"


def alert(node: object = None, status: str = "firing", **labels: object) -> dict:
    more = {} if node is None else {"node": node}
    return {
        "status": status,
        "labels": {"alertname": "NodeDown", **more, **labels},
        "annotations": {},
        "startsAt": "2026-01-01T00:00:00Z",
    }


def message(*alerts: dict) -> str:
    return json.dumps({"version": "4", "status": "firing", "receiver": "healer", "alerts": list(alerts)})


class Door(Node):
    """The control node."""

    folder: Path

    def play(self, *flags: str, tasks_from: str = "main", rc: int = 0, **more) -> tuple[str, set[str]]:
        """Run the role in a stranger's playbook; what the run printed, and the tasks that changed something."""
        role = {"name": "homelab.inference.healer", "tasks_from": tasks_from}
        play = {"hosts": "all", "gather_facts": False, "tasks": [{"ansible.builtin.include_role": role}]}
        # Written as an owner would who has it from a vault: not to be read as a template.
        variables = {
            "healer_nodes": NODES,
            "healer_command": ["/usr/local/bin/record", *ODD, "recover_node={node}"],
            "healer_run_user": "lab",
            "healer_directory": "/home/lab",
            "healer_environment": {"GREETING": 'hello "you" 5%'},
            "healer_cooldown": 4,
            **more,
        }
        (self.folder / "play.json").write_text(json.dumps([play]))
        (self.folder / "secret.yml").write_text(f"healer_secret: !unsafe {json.dumps(SECRET)}\n")
        inventory = f"{self.name},"
        done = subprocess.run(
            [
                *(ANSIBLE, "-i", inventory, "-c", "community.docker.docker", "--diff"),
                *("-e", f"@{self.folder}/secret.yml", "-e", json.dumps(variables), *flags),
                str(self.folder / "play.json"),
            ],
            env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
            capture_output=True,
            text=True,
            timeout=400,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        output = done.stdout + done.stderr
        assert done.returncode == rc, output
        assert CORE not in output
        changed, task = set(), ""
        for line in output.splitlines():
            if found := re.match(r"TASK \[(?:homelab\.inference\.healer : )?(.*)\]", line):
                task = found[1]
            elif line.startswith("changed:"):
                changed.add(task)
        return output, changed

    def send(self, body: str | bytes, secret: str | None = SECRET, copies: int = 1) -> str:
        """Send a message, as Alertmanager does, and return the status of the answers."""
        if secret is not None:
            self.write("/run/header", f"Authorization: Bearer {secret}\n")
        self.write("/run/body", body)
        header = "" if secret is None else "-H @/run/header"
        return self(
            f"for i in $(seq {copies}); do curl -s -o /dev/null -w '%{{http_code}} ' --data-binary @/run/body {header} "
            "-H 'Content-Type: application/json' http://127.0.0.1:9099/hooks/recover & done; wait; true"
        )

    def recoveries(self) -> list[str]:
        """The nodes that were recovered, in order."""
        lines = self("cat /home/lab/recoveries 2>/dev/null || true").splitlines()
        return [re.search(r"recover_node=([^|]*)", line)[1] for line in lines]

    def of(self, *nodes: str) -> list[str]:
        return [node for node in self.recoveries() if node in nodes]

    def settle(self) -> None:
        """Wait until all that was asked for has been looked at and has ended."""
        still = (
            "ls -A /run/homelab-healer | grep -q . || systemctl is-active -q homelab-healer-start || "
            "systemctl list-units --plain --no-legend 'homelab-recover@*' | grep -v failed | grep -q ."
        )
        until("an empty spool", lambda: self.run(still, check=False).returncode == 1)

    def log(self, *units: str) -> str:
        which = " ".join(f"-u '{unit}'" for unit in units or ("homelab-healer", "homelab-healer-start"))
        return self(f"journalctl --no-pager -o cat {which}")

    def metric(self, reason: str) -> int:
        text = self("cat /var/lib/homelab-inference/metrics/healer.prom")
        return int(re.search(rf'refused_total{{reason="{reason}"}} (\d+)', text)[1])


@pytest.fixture(scope="module")
def door(tmp_path_factory):
    with Door() as machine:
        machine.folder = tmp_path_factory.mktemp("healer")
        machine.write("/usr/local/bin/record", RECORD)
        machine("chmod 755 /usr/local/bin/record; id lab || useradd --create-home lab")
        yield machine


def test_a_dry_run_on_a_fresh_machine(door):
    before = door("find /etc /usr/local /var/lib/homelab-inference /etc/passwd 2>/dev/null | sort | md5sum")
    output, changed = door.play("--check")
    assert {"Install | Say what would be installed", "Install | Make the user", UNITS, ANNOUNCED} <= changed
    assert "homelab-recover@.service" in output
    assert door("find /etc /usr/local /var/lib/homelab-inference /etc/passwd 2>/dev/null | sort | md5sum") == before
    assert "absent" in door("command -v webhook || echo absent")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"healer_secret": "only-fifteen-ch"}, "at least 16 printable characters"),
        ({"healer_secret": "a secret with spaces"}, "at least 16 printable characters"),
        ({"healer_nodes": ["fine", "Not fine; rm"]}, '"Not fine; rm" in healer_nodes'),
        ({"healer_nodes": ["-n"]}, '"-n" in healer_nodes'),
        ({"healer_nodes": ["line\n"]}, '"line\\n" in healer_nodes'),
        ({"healer_command": []}, "healer_command is empty"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_done(door, wrong, words):
    output, changed = door.play(rc=2, **wrong)
    assert words in re.sub(r"\s+", " ", output).replace('\\"', '"').replace("\\\\", "\\")
    assert wrong.get("healer_secret", "no secret") not in output
    assert changed == set()


def test_the_first_run_opens_the_door_and_the_second_changes_nothing(door):
    dummy, changed = door.play()
    assert {"Install | Install the package", "Install | Make the user", UNITS, OPENED} <= changed
    assert door("systemctl is-active homelab-healer homelab-healer-start.path").split() == ["active", "active"]
    assert door("systemctl is-enabled homelab-healer homelab-healer-start.path").split() == ["enabled", "enabled"]
    assert door.run("systemctl is-enabled webhook", check=False).stdout.strip() == "disabled"
    assert door.run("systemd-analyze verify homelab-healer.service homelab-recover@x.service").stderr == ""
    began = door("systemctl show -P InvocationID homelab-healer")
    assert door.play()[1] == set()
    assert door.play("--check")[1] == set()
    assert door("systemctl show -P InvocationID homelab-healer") == began


def test_one_alert_is_one_recovery(door):
    assert door.send(message(alert("helium"))) == "200"
    door.settle()
    assert door("grep =helium /home/lab/recoveries") == "|".join(
        [*ODD, "recover_node=helium", 'lab /home/lab C.UTF-8 hello "you" 5%']
    )
    assert "Recovery of helium was started" in door.log("homelab-healer-start")
    assert 'started_timestamp_seconds{node="helium"} 1' in door("cat /var/lib/homelab-inference/metrics/healer.prom")


def test_twenty_copies_at_once_are_one_recovery(door):
    assert door.send(message(*[alert("many")] * 3), copies=20).split() == ["200"] * 20
    door.settle()
    assert door.of("many") == ["many"]


def test_two_nodes_in_one_message_are_two_recoveries(door):
    assert door.send(message(alert("pair-1"), alert("resolved", "resolved"), alert("pair.2"))) == "200"
    door.settle()
    assert sorted(door.of("pair-1", "pair.2", "resolved")) == ["pair-1", "pair.2"]


def test_what_is_resolved_starts_nothing(door):
    assert door.send(message(alert("resolved", "resolved"))) == "200"
    door.settle()
    assert door.of("resolved") == []


@pytest.mark.parametrize("secret", [None, "", "wrong-secret-of-sixteen", SECRET + "x", SECRET[:-1]])
def test_without_the_secret_nothing_starts(door, secret):
    seen = len(door.log("homelab-healer"))
    assert door.send(message(alert("guarded")), secret=secret) == "403"
    assert (
        door(
            "curl -s -o /dev/null -w '%{http_code}' -H 'Authorization: Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==' "
            "-X POST http://127.0.0.1:9099/hooks/recover"
        )
        == "403"
    )
    assert door("curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1:9099/hooks/recover") == "405"
    door.settle()
    assert door.of("guarded") == []
    new = door.log("homelab-healer")[seen:]
    assert "trigger rules were not satisfied" in new and " 403 " in new
    assert not secret or secret not in new


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("stranger", '"stranger"'),
        ("; touch /tmp/x", '"; touch /tmp/x"'),
        ("$(id)", '"$(id)"'),
        ("../x", '"../x"'),
        ("helium\nRecovery of moon was started", '"helium\\nRecovery of moon was started"'),
        ("Helium", '"Helium"'),
        ("h\u00e9lium\u2028\x1b[31m", '"h\\u00e9lium\\u2028\\u001b[31m"'),
        ("x" * 5000, "xxx..."),
        ("", '""'),
        (["helium"], '["helium"]'),
        (7, "Node 7"),
        (None, "it has no label node"),
    ],
)
def test_who_is_no_node_of_the_list_starts_nothing_and_is_named(door, value, said):
    before, seen = door.recoveries(), len(door.log("homelab-healer"))
    assert door.send(message(alert(value))) == "200"
    door.settle()
    assert door.recoveries() == before
    new = door.log("homelab-healer")[seen:]
    assert said in new and "starts nothing" in new
    assert not re.search("^Recovery of moon", new, re.M)
    assert len(new) < 2500
    assert "absent" in door("ls /tmp/x 2>/dev/null || echo absent")


def test_what_is_no_message_starts_nothing_and_the_door_stays_open(door):
    before, counted = door.recoveries(), door.metric("message")
    bodies = [
        "",
        '{"version": "4", "alerts": [',
        "[]",
        "null",
        '"4"',
        "[" * 100000,
        json.dumps({"version": "3", "alerts": [alert("alive")]}),
        json.dumps({"version": "4", "alerts": {"0": alert("alive")}}),
        json.dumps({"version": "4", "alerts": [["alive"]]}),
        json.dumps({"version": "4", "alerts": [{"status": "firing", "labels": ["node", "alive"]}]}),
        message(*[alert("alive")] * 1001),
        message(alert("alive", summary="x" * 1100000)),
        b"\xff\xfe\x00",
    ]
    for body in bodies:
        assert door.send(body) == "200", body[:60]
        door.settle()
    assert door.recoveries() == before
    assert door.metric("message") == counted + len(bodies)
    # More than webhook can hold: it ends, or answers somehow, and is there again.
    door(
        "head -c 400000000 /dev/zero | tr '\\0' a | curl -s -m 60 -o /dev/null --data-binary @- -H @/run/header "
        "http://127.0.0.1:9099/hooks/recover; true"
    )
    until("an open door", lambda: door.send(message(alert("alive"))) == "200")
    door.settle()
    assert door.of("alive") == ["alive"]


def test_what_asks_too_soon_is_dropped(door):
    counted = door.metric("cooldown")
    door.send(message(alert("cool")))
    door.settle()
    door.send(message(alert("cool")))
    door.settle()
    assert door.of("cool") == ["cool"]
    assert "Recovery of cool was not started: one ended" in door.log("homelab-healer-start")
    assert door.metric("cooldown") == counted + 1
    time.sleep(4)
    door.send(message(alert("cool")))
    door.settle()
    assert door.of("cool") == ["cool", "cool"]


def test_while_somebody_changes_the_lab_nothing_starts(door):
    before = len(door.recoveries())
    door("/usr/bin/python3 -I /usr/local/lib/homelab-healer/healer.py hold")
    door.send(message(alert("kept-off")))
    refusal = "Recovery of kept-off was not started: the lab is being changed."
    until("the refusal", lambda: refusal in door.log())
    count = "grep -q 'held\"} [1-9]' /var/lib/homelab-inference/metrics/healer.prom"
    until("its count", lambda: door.run(count, check=False).returncode == 0)
    assert len(door.recoveries()) == before
    # Nobody says that it is over: the run that said it began was killed.
    door("touch -d '31 minutes ago' /run/homelab-healer-hold")
    door.send(message(alert("kept-off")))
    until("the recovery", lambda: door.of("kept-off") == ["kept-off"])
    door("rm -f /run/homelab-healer-hold")
    door.settle()


def test_who_changes_the_lab_waits_for_a_recovery_that_runs(door):
    door.send(message(alert("waited")))
    until("the recovery", lambda: door.of("waited"))
    door("/usr/bin/python3 -I /usr/local/lib/homelab-healer/healer.py hold")
    assert door("systemctl is-active homelab-recover@waited || true") == "inactive"
    door("/usr/bin/python3 -I /usr/local/lib/homelab-healer/healer.py release")
    assert door("test -e /run/homelab-healer-hold || echo gone") == "gone"


def test_a_check_names_what_an_edit_changes(door):
    edit = {"healer_cooldown": 0, "healer_budget": 2}
    dummy, announced = door.play("--check", **edit)
    assert announced == {"Configure | Write the settings", UNITS, ANNOUNCED}
    dummy, changed = door.play(**edit)
    assert changed == {"Configure | Write the settings", UNITS, OPENED}


def test_the_budget_of_a_node_ends_and_a_person_gives_it_anew(door):
    for node in ("spent", "failing"):
        for body in [message(alert(node))] * 3:
            door.send(body)
            door.settle()
        assert door.of(node) == [node, node]
        advice = f"systemctl reset-failed homelab-recover@{node}"
        assert f"Recovery of {node} was not started: 2 in 3600 s are used up." in door.log("homelab-healer-start")
        assert advice in door.log("homelab-healer-start")
        # Others have theirs, and what it said it does.
        door(advice)
        door.send(message(alert(node), alert("spent-2")))
        door.settle()
        assert door.of(node) == [node] * 3
    assert door.of("spent-2") == ["spent-2"] * 2
    assert door.metric("budget") == 2


def test_a_recovery_of_a_node_with_a_hyphen_can_be_started_by_hand(door):
    door("systemctl start homelab-recover@by-hand")
    assert door.of("by-hand") == ["by-hand"]


def test_a_recovery_that_takes_too_long_is_ended_with_all_it_began(door):
    door.play(healer_timeout=6)
    door.send(message(alert("slow")))
    until("the recovery", lambda: door.of("slow"))
    assert door("pgrep -fc 'sleep (1111|2222)'") == "2"
    counted = door.metric("running")
    door.send(message(alert("slow")))
    until("a refusal", lambda: door.metric("running") == counted + 1)
    until("the end", lambda: door("systemctl is-active homelab-recover@slow || true") == "failed")
    assert door.run("pgrep -fc 'sleep (1111|2222)'", check=False).stdout.strip() == "0"
    assert door.of("slow") == ["slow"]


def test_who_gets_hold_of_the_door_gets_no_further(door):
    """What its user can leave in the spool starts nothing that an alert could not start."""
    before = door.recoveries()
    door.write(
        "/tmp/attack",
        "cd /run/homelab-healer && mkdir -p 'node:helium;x/deep' && ln -s /etc/passwd link && "
        "touch 'node:..' 'node:ssh' 'node:' 'refused:root:1' 'refused:running:1' \"$(printf 'node:he\\nlium')\" && "
        "echo '[Service]' >unit && ln -s /etc 'dir'",
    )
    door("runuser -u homelab-healer -- sh /tmp/attack")
    door.settle()
    assert door.recoveries() == before
    assert door("ls -A /run/homelab-healer; ls -ld /etc/passwd | wc -l") == "1"
    assert door.run("runuser -u homelab-healer -- systemctl start homelab-recover@helium", check=False).returncode
    door.send(message(alert("spooled")))
    door.settle()
    assert door.of("spooled") == ["spooled"]


def test_the_secret_is_seen_nowhere(door):
    assert CORE not in door("journalctl --no-pager -o export")
    assert CORE not in door("ps axww -o args; cat /proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n'")
    assert CORE not in door(
        "systemctl show homelab-healer homelab-healer-start homelab-recover@helium; systemctl cat homelab-healer"
    )
    files = door(f"grep -rlF '{CORE}' /etc /usr/local /var/lib/homelab-inference /run /tmp /home 2>/dev/null || true")
    held = [file for file in files.split() if file != "/run/header"]
    assert held == ["/etc/homelab-inference/healer-hooks.json"]
    assert door("stat -c '%a %U %G' /etc/homelab-inference/healer-hooks.json") == "640 root homelab-healer"
    for other in ("lab", "nobody"):
        assert door.run(
            f"runuser -u {other} -- sh -c 'cat /etc/homelab-inference/healer-hooks.json || ls /run/homelab-healer'",
            check=False,
        ).returncode
    pid = door("systemctl show -P MainPID homelab-healer")
    status = door(f"cat /proc/{pid}/status")
    assert re.search(r"^NoNewPrivs:\s*1$", status, re.M)
    assert re.search(r"^CapEff:\s*0+$", status, re.M)
    assert door(f"stat -c %U /proc/{pid}") == "homelab-healer"


def test_a_new_secret_is_the_only_one_after_a_run(door):
    new = "another-secret-of-the-door"
    dummy, changed = door.play(healer_secret=new)
    assert changed == {"Configure | Write the hook with the secret", UNITS, OPENED}
    assert door.send(message(alert("guarded"))) == "403"
    assert door.send(message(alert("guarded", "resolved")), secret=new) == "200"
    door.play()
    assert door.send(message(alert("guarded", "resolved")), secret=new) == "403"


def test_what_an_interrupted_run_wrote_is_read_by_the_next(door):
    door("sed -i 's/^Description=Alert door.*/& /' /etc/systemd/system/homelab-healer.service")
    door("touch /etc/homelab-inference/healer-hooks.json")
    began = door("systemctl show -P InvocationID homelab-healer")
    assert OPENED in door.play()[1]
    assert door("systemctl show -P InvocationID homelab-healer") != began
    door("touch /etc/homelab-inference/healer-hooks.json")
    assert door.play()[1] == {OPENED}
    assert door.play()[1] == set()


def test_a_real_alertmanager_is_understood(door):
    door("DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends prometheus-alertmanager")
    door.write("/etc/prometheus/healer-secret", SECRET)
    config = {
        "route": {"receiver": "healer", "group_by": ["node"], "group_wait": "0s", "group_interval": "1s"},
        "receivers": [
            {
                "name": "healer",
                "webhook_configs": [
                    {
                        "url": "http://127.0.0.1:9099/hooks/recover",
                        "http_config": {
                            "authorization": {"type": "Bearer", "credentials_file": "/etc/prometheus/healer-secret"}
                        },
                    }
                ],
            }
        ],
    }
    door.write("/etc/prometheus/alertmanager.yml", yaml.safe_dump(config))
    door("chown prometheus /etc/prometheus/healer-secret && chmod 600 /etc/prometheus/healer-secret")
    door("systemctl restart prometheus-alertmanager")
    api = "http://127.0.0.1:9093/api/v2/alerts"
    until("Alertmanager", lambda: door.run(f"curl -sf {api}", check=False).returncode == 0)

    def push(**times: str) -> None:
        labels = {"alertname": "NodeDown", "node": "fired", "instance": "192.0.2.1:9100"}
        door.write("/run/alerts", json.dumps([{"labels": labels, **times}]))
        door(f"curl -sf -H 'Content-Type: application/json' --data-binary @/run/alerts {api}")

    push()
    until("the recovery", lambda: door.of("fired"))
    door.settle()
    seen = len(door.log("homelab-healer"))
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    push(startsAt="2026-01-01T00:00:00Z", endsAt=now)
    until("the news that it is resolved", lambda: "No alert is firing" in door.log("homelab-healer")[seen:])
    door.settle()
    assert door.of("fired") == ["fired"]
    door("systemctl disable --now prometheus-alertmanager")


def test_removal_leaves_nothing(door):
    door.play(healer_timeout=600)
    door("systemctl reset-failed homelab-recover@slow")
    door.send(message(alert("slow")))
    until("a recovery", lambda: len(door.of("slow")) == 2)
    # The door and a recovery do not wait for each other.
    door("timeout 10 systemctl restart homelab-healer")
    assert door("pgrep -fc 'sleep (1111|2222)'") == "2"
    dummy, announced = door.play("--check", tasks_from="remove")
    dummy, changed = door.play(tasks_from="remove")
    assert announced - {"Remove | Remove the directories that are empty now"} == changed - {
        "Remove | Remove the directories that are empty now"
    }
    assert door.run("pgrep -fc 'sleep (1111|2222)'", check=False).stdout.strip() == "0"
    left = "find / -xdev \\( -name '*healer*' -o -name 'homelab-*' \\) -not -path '/proc/*' -not -path '/var/lib/apt/*'"
    assert door(f"{left} -not -path '/etc/prometheus/*' -not -path '/var/log/*'; find /run -name '*healer*'") == ""
    assert door("systemctl list-units --all --plain --no-legend 'homelab-*'") == ""
    assert "absent" in door("id homelab-healer 2>/dev/null || echo absent")
    assert "absent" in door("command -v webhook || echo absent")
    assert door.play(tasks_from="remove")[1] == set()
    assert door.play("--check", tasks_from="remove")[1] == set()


def test_a_webhook_of_the_owner_goes_on(door):
    door("DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends webhook")
    door("echo '[]' >/etc/webhook.conf; systemctl enable --now webhook")
    began = door("systemctl show -P InvocationID webhook")
    dummy, changed = door.play()
    assert "Install | Install the package" not in changed
    assert door("systemctl is-active webhook homelab-healer").split() == ["active", "active"]
    door.play(tasks_from="remove")
    assert door("systemctl is-active webhook; systemctl is-enabled webhook").split() == ["active", "enabled"]
    assert door("systemctl show -P InvocationID webhook") == began


def test_the_rulebook_beside_it_is_one():
    """By ansible-rulebook's own schema, where it is installed."""
    package = pytest.importorskip("ansible_rulebook", reason="ansible-rulebook is not installed")
    jsonschema = pytest.importorskip("jsonschema")
    schema = Path(package.__file__).parent / "schema" / "ruleset_schema.json"
    rulebook = yaml.safe_load((ROOT / "extensions/eda/rulebooks/recover.yml").read_text(encoding="utf-8"))
    jsonschema.validate(rulebook, json.loads(schema.read_text(encoding="utf-8")))
