# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Reads the declaration of all hosts, validates it and derives every view. The first task of every playbook."""

from __future__ import annotations

import datetime
import json
import os
import time
from pathlib import Path
from typing import Any

import yaml
from ansible.errors import AnsibleActionFail, AnsibleError
from ansible.module_utils.parsing.convert_bool import boolean
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.homelab.inference.plugins.plugin_utils import (
    drift,
    exclusive,
    generations,
    lab,
    lock,
    maintenance,
    measured,
    moves,
    schema,
    views,
)

COLLECTION = Path(__file__).resolve().parents[2]
# What else of a host's variables the views need; everything below lab_ and node_ is the declaration itself.
CONNECTION_WORDS = ("ansible_host", "ansible_port", "ansible_connection")
# Seconds between two looks at whether another run has ended, and between two sentences about it.
LOOK, SAY = 2, 60
# Roles that are found by a unit with another name.
UNITS = {"homelab-healer": "healer", "homelab-engine-metric": "node_exporter"}
# Where the control node keeps what it needs to repair the lab by itself: generations and more, beside a lab.lock.yml.
STATE = "/var/lib/homelab-inference/lab"


class ActionModule(ActionBase):
    """The door; the thinking is in plugin_utils."""

    TRANSFERS_FILES = False
    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return declaration, views, lock and warnings; fail with all problems at once."""
        result = super().run(tmp, task_vars)
        _valid, args = self.validate_argument_spec(
            argument_spec={
                "lock": {"type": "dict"},
                "exclusive": {"type": "str"},
                "patience": {"type": "int", "default": 3600},
                "seal": {"type": "bool", "default": False},
                "lost": {"type": "list", "elements": "str", "default": []},
                "closed": {"type": "list", "elements": "str", "default": []},
            }
        )
        hostvars = task_vars["hostvars"]
        declaration = lab.collect({host: self.words(hostvars, host) for host in hostvars}, dict(task_vars["groups"]))
        problems, warnings = lab.validate(declaration)
        if problems:
            count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
            raise AnsibleActionFail(
                f"The declaration has {count}; nothing was touched.\n"
                + "\n".join(f"- {problem}" for problem in problems)
            )
        catalogue = schema.load("catalogue.yml")
        path = self.lock_path(declaration, hostvars)
        home = generations.origin(path)
        if args["exclusive"] and not self._task.check_mode:
            self.alone(exclusive.path(home), args["exclusive"], args["patience"])
            newest = generations.newest(generations.directory(home))
            if path != home and newest and newest.name != path.parent.resolve().name:
                raise AnsibleActionFail(
                    f"{args['exclusive']} was given generation {path.parent.resolve().name}, and {newest.name} was "
                    "deployed meanwhile; nothing was touched. Run it again."
                )
        resting = maintenance.read(maintenance.path(home), datetime.datetime.now(datetime.timezone.utc))
        known = args["lock"] or (lock.parse(path.read_text(encoding="utf-8"), str(path)) if path.exists() else None)
        moved = moves.read(moves.path(home), known)
        # What runs, for everything but the plan itself.
        runs = moves.applied(known, moved) if known else None
        if args["lost"] and runs:
            now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
            found = moves.without(runs, lab.models(declaration), args["lost"], now, args["closed"])
            moved, runs = (found, moves.applied(known, found)) if found else (moved, runs)
        declared, images = views.declared(declaration), self.images(hostvars, declaration)
        stale = (
            lock.differences({**known["declared"], "images": known["images"]}, {**declared, "images": images})
            if known
            else []
        )
        facts = {
            host: self.facts(hostvars, host)
            for host in declaration["groups"]["inference"] + declaration["groups"]["library"]
        }
        measured_file = lock.beside(path, ".measured.json")
        seen = measured.parse(measured_file.read_text(encoding="utf-8")) if measured_file.exists() else {}
        before = known["nodes"] if known else {}
        for host, found in facts.items():
            missing: list[dict[str, Any]] = []
            if found and host in before and not boolean(task_vars.get("lab_accept_drift", False)):
                found["devices"], missing = drift.bind(found["devices"], before[host]["devices"])
                warnings += [self.missing(host, device, found["problems"]) for device in missing]
            if found:
                ours, held = self.held(runs, host, self.running(hostvars, host))
                facts[host] = drift.without_ours(found, ours, [device["id"] for device in missing], held)
        result.update(
            changed=False,
            warnings=[*result.get("warnings", []), *warnings],
            declaration={key: declaration[key] for key in ("lab", "nodes", "groups")},
            declared=declared,
            images=images,
            plain_http=views.plain_http(declaration["lab"].get("lab_registry_mirror")),
            models={name: model for name, model in lab.models(declaration).items() if model["engine"] == "llamacpp"},
            nodes=views.planner_nodes(
                declaration,
                {**before, **{host: found for host, found in facts.items() if found}},
                catalogue,
                measured.overheads(seen),
            ),
            libraries={host: found["library"] for host, found in facts.items() if found},
            lock=known,
            lock_file=str(path),
            measured_file=str(measured_file),
            taken=seen,
            moves=moved,
            moved=moves.sentences(known, moved) if known else [],
            moves_file=str(moves.path(home)),
            untold_file=str(lock.beside(home, ".untold")),
            maintenance=resting,
            maintenance_file=str(maintenance.path(home)),
            generations=str(generations.directory(home)),
            healer={
                "host": lab.door_host(declaration) or "",
                "here": generations.directory(home).is_relative_to(STATE),
                "state": STATE,
            },
            guests=views.guests(declaration),
            reports=str(lock.beside(home, ".reports")),
            inventory_dir=str(self.inventory_dir(hostvars)),
            stale=stale,
            secrets_missing=[
                name for name in lab.generated_secrets(declaration) if not declaration["secrets"].get(name)
            ],
            secrets_file=str(self.inventory_dir(hostvars) / "group_vars" / "all" / "secrets.yml"),
        )
        taken = {
            host: hostvars[host]["__lab_taken"]
            for host in hostvars
            if "servers" in (hostvars[host].get("__lab_taken") or {})
        }
        if known and taken:
            found, sentences = measured.merge(seen, runs, taken)
            result["measured"] = {"text": measured.render(found), "sentences": sentences}
        if not stale:
            result["views"] = views.views(declaration, runs, catalogue, resting)
            result["servers"] = views.model_servers(declaration, runs, resting) if runs else []
            result["endpoints"] = views.endpoints(declaration, runs, catalogue, resting) if runs else []
            found = {host: self.made(hostvars, host) for host in hostvars}
            gone = views.goes_away(result["views"], found)
            there = sum(map(len, found.values()))
            result["goes_away"] = gone
            kept = {host: self.kept(hostvars, host) for host in hostvars if self.asked(hostvars, host)}
            result["rolling"] = views.rolling(result["views"], kept)
            result["owed"] = views.owed(result["views"], kept)
            # Those that are changed while they serve come later; they answered.
            later = list(task_vars["groups"].get("lab_rolling", []))
            ready = {
                name: [host for host in hostvars if self.noted(hostvars, host, name)] + later
                for name in ("__lab_servers_up", "__lab_gateway_up")
            }
            result["given_up"] = views.given_up(result["views"], result["servers"], kept, gone, *ready.values())
            result["most_goes_away"] = sum(map(len, gone.values())) * 2 > there
            if args["seal"] and known and not self._task.check_mode:
                result["generation"] = self.seal(path, hostvars, dict(task_vars["groups"]), known, images)
        return result

    @staticmethod
    def alone(file: Path, what: str, patience: int) -> None:
        """Wait until no other run changes the lab, and say for whom."""
        # The process of ansible-playbook: this is a worker of it.
        pid, began, said = os.getppid(), time.monotonic(), -float(SAY)
        while holder := ActionModule.holder(file, what, pid):
            waited = time.monotonic() - began
            who = f"{holder['what']} (process {holder['pid']}, since {holder['since']})"
            if waited >= patience:
                raise AnsibleActionFail(
                    f"{what} was not started: {who} has been changing the lab for longer than {patience} s. "
                    "Wait for it, or end that process; the lab is free then."
                )
            if waited - said >= SAY:
                said = waited
                Display().display(f"waiting for {who}, which changes the lab")
            time.sleep(LOOK)

    @staticmethod
    def holder(file: Path, what: str, pid: int) -> dict[str, Any] | None:
        """Return who is changing the lab; nobody when the lab is ours now."""
        try:
            return exclusive.take(file, what, pid)
        except OSError as error:
            raise AnsibleActionFail(
                f"Noting in {file} that {what} changes the lab failed: {error}. Let whoever runs it write there; "
                "nothing was touched."
            ) from error

    def seal(
        self, path: Path, hostvars: Any, groups: dict[str, list[str]], known: dict[str, Any], images: dict[str, Any]
    ) -> int:
        """Keep declaration and lock as they are deployed now; return the number of the generation."""
        words = {
            host: {
                **self.words(hostvars, host),
                **{name: hostvars[host][name] for name in hostvars.raw_get(host) if generations.kept(name)},
                # With defaults filled in: those of another version are others.
                **images,
            }
            for host in hostvars
        }
        home = generations.directory(path)
        try:
            return generations.seal(home, generations.inventory(words, groups, tuple(images)), known, self.version())
        except OSError as error:
            raise AnsibleActionFail(
                f"Keeping the declaration in {home} failed: {error}. Recovery works from there; nothing was touched."
            ) from error

    @staticmethod
    def version() -> str:
        """Return the version of this collection; installed, it has a manifest, in a checkout none."""
        manifest = COLLECTION / "MANIFEST.json"
        if manifest.exists():
            return str(json.loads(manifest.read_text(encoding="utf-8"))["collection_info"]["version"])
        return str(yaml.safe_load((COLLECTION / "galaxy.yml").read_text(encoding="utf-8"))["version"])

    def words(self, hostvars: Any, host: str) -> dict[str, Any]:
        """Return the host's variables that belong to the declaration, templated."""
        names = [
            name for name in hostvars.raw_get(host) if name.startswith(("lab_", "node_")) or name in CONNECTION_WORDS
        ]
        found = {}
        for name in names:
            try:
                found[name] = hostvars[host][name]
            except AnsibleError as error:
                raise AnsibleActionFail(
                    f"Cannot read {name} of host {host}: {error}. Correct the expression in the inventory."
                ) from error
        return found

    def facts(self, hostvars: Any, host: str) -> dict[str, Any]:
        """Return what the host said of itself in this run, empty where it was not asked or did not answer."""
        known = hostvars[host].get("ansible_facts", {})
        if "inference_gpus" not in known or "memtotal_mb" not in known:
            return {}
        return {
            "devices": known["inference_gpus"],
            "memory_mib": known["memtotal_mb"],
            "memory_used_mib": known.get("memory_mb", {}).get("nocache", {}).get("used"),
            "cpus": known.get("processor_vcpus"),
            "problems": known.get("inference_gpu_problems", []),
            "library": (hostvars[host].get("__lab_library") or {}).get("files", []),
        }

    @staticmethod
    def held(known: dict[str, Any] | None, host: str, running: list[str]) -> tuple[dict[str, int], dict[str, Any]]:
        """Return what our servers hold of a host, and what others held of it where ours hold now more and now less."""
        if not known or host not in known["nodes"]:
            return {}, {}
        node = known["nodes"][host]
        before = {device["id"]: device.get("used_mib") for device in node["devices"]}
        before["host"] = node.get("memory_used_mib")
        turning = views.awake(known["instances"], host, running)
        held = {where: size for where, size in before.items() if where in turning}
        return views.planned_memory(known["instances"], host, running), held

    @staticmethod
    def running(hostvars: Any, host: str) -> list[str]:
        """Return the names of our containers that run on a host, as planning.yml found them in this run."""
        found = (hostvars[host].get("__lab_running") or {}).get("containers") or []
        return [name.lstrip("/") for container in found for name in container["Names"]]

    @staticmethod
    def missing(host: str, device: dict[str, Any], problems: list[dict[str, Any]]) -> str:
        """Return the sentence about a GPU that is in the lock and was not found."""
        why = "; ".join(f"{problem['evidence']} {problem['remedy']}" for problem in problems) or "Look at the machine."
        name = f"{device['id']} of {host} ({device['name']}, {drift.identity(device)})"
        return (
            f"DRIFT: {name} is in the lock and was not found. {why} "
            "The plan keeps it; if it is gone for good, plan with -e lab_accept_drift=true."
        )

    @staticmethod
    def made(hostvars: Any, host: str) -> list[str]:
        """Return the names of what we made on a host, as site.yml found it earlier in this run."""
        return [
            UNITS.get(name := Path(file["path"]).name.removesuffix(".service"), name)
            for file in (hostvars[host].get("__lab_made") or {}).get("files", [])
        ]

    @staticmethod
    def asked(hostvars: Any, host: str) -> bool:
        """Return whether a host was reached when the playbook asked for its slice."""
        return "stdout" in (hostvars[host].get("__lab_slice") or {})

    @staticmethod
    def noted(hostvars: Any, host: str, name: str) -> bool:
        """Return whether site.yml noted something of a host in this run."""
        return bool(hostvars[host].get(name, False))

    @staticmethod
    def kept(hostvars: Any, host: str) -> dict[str, Any]:
        """Return the slice that a host keeps from the last run, as site.yml read it; empty where there is none."""
        try:
            return dict(json.loads((hostvars[host].get("__lab_slice") or {}).get("stdout") or "{}"))
        except ValueError:
            return {}  # half written; it is written anew

    def images(self, hostvars: Any, declaration: dict[str, Any]) -> dict[str, Any]:
        """Return the image variables that a lab needs: what the inventory says, else the roles' own defaults."""
        defaults: dict[str, Any] = {}
        for path in sorted((COLLECTION / "roles").glob("*/defaults/main.yml")):
            defaults.update(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
        found = {}
        for name in views.image_variables(declaration):
            own = [hostvars[host][name] for host in hostvars if name in hostvars.raw_get(host)]
            value = own[0] if own else defaults.get(name)
            found[name] = {**defaults.get(name, {}), **value} if isinstance(value, dict) else value
        return found

    @staticmethod
    def inventory_dir(hostvars: Any) -> Path:
        """Return the directory of the inventory that the first host comes from."""
        return Path(
            next(
                (str(hostvars[host]["inventory_dir"]) for host in hostvars if hostvars[host].get("inventory_dir")), "."
            )
        )

    def lock_path(self, declaration: dict[str, Any], hostvars: Any) -> Path:
        """Return the path of the lock; hidden, because Ansible reads other YAML files beside an inventory as such."""
        declared = declaration["lab"].get("lab_lock_file")
        return Path(declared) if declared else self.inventory_dir(hostvars) / ".lab.lock.yml"
