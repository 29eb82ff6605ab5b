# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Plans the documented labs: from their declarations, declared hardware and synthetic headers, with no host at hand.

Each plan is kept beside this file as text for reviewers. `REWRITE_PLANS=1 pytest tests/unit/test_plans.py` writes them
anew; read the difference as an owner of that lab would before it is committed.
"""

from __future__ import annotations

import copy
import hashlib
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ansible.inventory.manager import InventoryManager
from ansible.parsing.dataloader import DataLoader
from ansible.vars.manager import VariableManager
from ansible_collections.homelab.inference.plugins.module_utils import placement
from ansible_collections.homelab.inference.plugins.plugin_utils import lab, planning, schema, views

from tests.models import synthetic

HERE = Path(__file__).resolve().parent
INVENTORIES = HERE.parents[1] / "inventories"
WIDTH = 120

# What the declared sources hold, as synthetic models.
REPOSITORIES = {
    "bartowski/Qwen2.5-7B-Instruct-GGUF": "qwen2.5-7b",
    "bartowski/Qwen2.5-32B-Instruct-GGUF": "qwen2.5-32b",
    "bartowski/Qwen2.5-Coder-1.5B-Instruct-GGUF": "qwen2.5-coder-1.5b",
    "bartowski/Qwen2.5-Coder-7B-Instruct-GGUF": "qwen2.5-coder-7b",
    "bartowski/DeepSeek-R1-Distill-Llama-8B-GGUF": "deepseek-r1-distill-llama-8b",
    "bartowski/Qwen_Qwen3-1.7B-GGUF": "qwen3-1.7b",
    "bartowski/Qwen2.5-14B-Instruct-GGUF": "qwen2.5-14b",
    "bartowski/Qwen_Qwen3-8B-GGUF": "qwen3-8b",
    "ggml-org/Qwen2.5-VL-7B-Instruct-GGUF": "qwen2.5-vl-7b",
    "nomic-ai/nomic-embed-text-v1.5-GGUF": "nomic-embed-text-v1.5",
    "Qwen/Qwen3-Embedding-8B-GGUF": "qwen3-embedding-8b",
    "ggml-org/gpt-oss-20b-GGUF": "gpt-oss-20b",
    "ggml-org/gpt-oss-120b-GGUF": "gpt-oss-120b",
    "unsloth/Qwen3-Coder-30B-A3B-Instruct-GGUF": "qwen3-coder-30b-a3b",
}
# Where the source gives a size, that counts: of the published quantisations the nearest that is not smaller.
LIBRARIES = {
    "Qwen3.5-122B-A10B.gguf": ("qwen3.5-122b-a10b", "Q5_K_S"),  # 80 GB
    "gemma-4-26B-A4B-Q4_0.gguf": ("gemma-4-26b-a4b", "Q5_K_M"),  # 19 GB, though a Q4_0 of this model has 14
    "gemma-4-26B-A4B-Q4_0-of-14GB.gguf": ("gemma-4-26b-a4b", "Q4_0"),
}
PROJECTORS = {"qwen2.5-vl-7b": "mmproj-qwen2.5-vl-7b"}


@dataclass(frozen=True)
class Scenario:
    """One plan: a lab as declared, or with one change."""

    lab: str
    question: str
    change: Callable[[dict[str, Any]], None] = lambda declaration: None


def _no_wired_limit(declaration: dict[str, Any]) -> None:
    # What Metal grants of 96 GiB by itself: three quarters.
    declaration["nodes"]["lithium"]["node_gpus"][0]["cap_mib"] = 73728


def _small_gemma(declaration: dict[str, Any]) -> None:
    declaration["lab"]["lab_models"]["gemma4-26b-a4b"]["source"] = {"library": "gemma-4-26B-A4B-Q4_0-of-14GB.gguf"}


def _on_the_nuc(declaration: dict[str, Any]) -> None:
    declaration["lab"]["lab_models"]["qwen3.5-122b-a10b"]["nodes"] = "hydrogen"


def _without(node: str) -> Callable[[dict[str, Any]], None]:
    def change(declaration: dict[str, Any]) -> None:
        for hosts in declaration["groups"].values():
            if node in hosts:
                hosts.remove(node)
        for model in declaration["lab"]["lab_models"].values():
            if node in lab.listed(model.get("nodes", [])):
                del model["nodes"]

    return change


def _own_engine_on_orin(declaration: dict[str, Any]) -> None:
    declaration["nodes"]["orin"]["node_runtime"] = "docker"
    declaration["lab"]["lab_models"] = {
        "assistant": {
            "source": {"hf": "ggml-org/gpt-oss-20b-GGUF", "quant": "MXFP4"},
            "categories": ["chat"],
            "priority": 90,
        },
        "coder": {
            "source": {"hf": "unsloth/Qwen3-Coder-30B-A3B-Instruct-GGUF", "quant": ["Q8_0", "Q6_K"]},
            "context": [131072, 65536],
            "categories": ["code"],
        },
        "embed": {"source": {"hf": "nomic-ai/nomic-embed-text-v1.5-GGUF", "quant": "F16"}, "categories": ["embed"]},
    }


def _large_on_caraxes(declaration: dict[str, Any]) -> None:
    declaration["lab"]["lab_models"]["large"]["nodes"] = "caraxes"


def _all_on_the_cards(declaration: dict[str, Any]) -> None:
    declaration["lab"]["lab_models"]["mark-i"]["slots"] = 4
    for name in ("mark-v", "mark-iii", "mark-iv", "mark-vi", "mark-i"):
        declaration["lab"]["lab_models"][name]["context"] = 16384


SCENARIOS = {
    "mrzk": Scenario("mrzk", "The lab as declared: an 80 GB model under the wired limit, Gemma on two RTX 5000."),
    "mrzk-metal-default": Scenario(
        "mrzk", "The Mac without the wired limit: Metal grants three quarters of its memory.", _no_wired_limit
    ),
    "mrzk-gemma-14gb": Scenario("mrzk", "Gemma as a Q4_0 really is: 14 GB instead of 19.", _small_gemma),
    "mrzk-without-lithium": Scenario("mrzk", "The Mac is gone; its model may go anywhere.", _without("lithium")),
    "mrzk-on-the-nuc": Scenario("mrzk", "The 80 GB model pinned to the NUC: refused.", _on_the_nuc),
    "dragons": Scenario("dragons", "The lab as declared: 8 GB and 24 GB."),
    "dragons-large-on-8gb": Scenario("dragons", "The large model pinned to the 8 GB card.", _large_on_caraxes),
    "lumina": Scenario("lumina", "The lab as declared: five models of 20.1 GB of weights on one 24 GB card."),
    "lumina-16k": Scenario(
        "lumina", "The same five with 16384 tokens each, and four slots of the 14B.", _all_on_the_cards
    ),
    "jetson": Scenario("jetson", "The lab as declared: Triton serves all models, and plans its memory itself."),
    "jetson-llamacpp": Scenario(
        "jetson", "What the Orin's unified memory holds with this engine.", _own_engine_on_orin
    ),
    "strix": Scenario("strix", "The lab as declared: unified memory of two Strix Halo, one R9700."),
}


def declaration(scenario: Scenario) -> dict[str, Any]:
    """The declaration of a documented lab."""
    loader = DataLoader()
    inventory = InventoryManager(loader=loader, sources=[str(INVENTORIES / scenario.lab / "lab.yml")])
    variables = VariableManager(loader=loader, inventory=inventory)
    hosts = {host.name: variables.get_vars(host=host) for host in inventory.get_hosts()}
    groups = {name: [host.name for host in group.get_hosts()] for name, group in inventory.groups.items()}
    found = lab.collect(copy.deepcopy(hosts), groups)
    scenario.change(found)
    return found


def _file(name: str, quant: str, published: str | None = None) -> dict[str, Any]:
    name = published or f"{name}-{quant}.gguf"
    return {"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest()}


def _found(model: str, source: dict[str, Any]) -> dict[str, Any]:
    """What module model_source_info would return for a source."""
    name = REPOSITORIES[source["hf"]]
    quant = lab.listed(source.get("quant", synthetic.MODELS[name].quants[0]))[0]
    size = synthetic.header(name, quant)[1]
    projector = None
    if source.get("mmproj"):
        file = PROJECTORS[name]
        projector = {
            **_file(file, "F16"),
            "size": synthetic.header(file, "F16")[1],
            "shape": synthetic.shape(file, "F16"),
        }
    return {
        "model": model,
        "commit": "0" * 40,
        "quant": quant,
        "files": [{**_file(name, quant), "size": size}],
        "mmproj": projector,
        "shape": synthetic.shape(name, quant),
    }


def _libraries(found: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The files that the declaration expects in libraries, on the first node that has one."""
    hosts = [host for host in found["groups"]["library"] if found["nodes"][host].get("node_library")]
    wanted = [model["source"]["library"] for model in lab.models(found).values() if "library" in model["source"]]
    entries = []
    for file in wanted:
        name, quant = LIBRARIES[file]
        size = synthetic.header(name, quant)[1]
        entry = {**_file(name, quant, file), "path": file, "size": size, "mmproj": False, "shards": []}
        entries.append({**entry, "library": "/models", "commit": None, "shape": synthetic.shape(name, quant)})
    return dict.fromkeys(hosts, entries)


def make(scenario: Scenario) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Plan a scenario offline; return what was known of the nodes, of the files, and the plan."""
    found = declaration(scenario)
    libraries = _libraries(found)
    models = {name: model for name, model in lab.models(found).items() if model["engine"] == "llamacpp"}
    outside = [_found(entry["model"], entry["source"]) for entry in planning.sources(models, str(INVENTORIES))]
    resolved = planning.resolve(models, outside, libraries, None)
    nodes = views.planner_nodes(found, {}, schema.load("catalogue.yml"))
    for host, entries in libraries.items():
        if host in nodes:
            nodes[host]["library"] = entries
    plan = placement.plan(models, resolved, nodes, [], unresolved=planning.unresolved(models, [], libraries))
    return nodes, resolved, plan


def render(scenario: Scenario) -> str:
    """The plan as text for reviewers."""
    nodes, resolved, plan = make(scenario)
    lines = [f"# {scenario.question}", "# Written from synthetic headers and declared hardware; MiB throughout."]
    lines += [f"value {plan['value']:.2f}", ""]
    for instance in plan["instances"]:
        lines += [*_instance(instance, resolved[instance["model"]]), ""]
    for refusal in plan["refused"]:
        lines += _wrapped(f"NOT PLANNED {refusal['model']}: {refusal['reason']}", "  ")
        if refusal.get("change"):
            lines += _wrapped(f"  cheapest change: {refusal['change']['sentence']}", "    ")
        lines.append("")
    lines += _left(nodes, plan)
    lines += ["", "start order"]
    lines += [f"  {host}: {', '.join(names)}" for host, names in plan["order"].items() if names]
    lines += ["", "survival"]
    for entry in plan["survival"]:
        lines += _wrapped(f"  {entry['sentence']}", "    ")
    return "\n".join(lines) + "\n"


def _instance(instance: dict[str, Any], resolved: dict[str, Any]) -> list[str]:
    chosen = resolved.get("variants", [resolved])[instance.get("variant", 0)]
    size = sum(file["size"] for file in chosen["files"]) / 1e9
    options = dict(instance["server_options"])
    context, slots = options.pop("ctx-size"), options.pop("parallel")
    keys, values = options.pop("cache-type-k"), options.pop("cache-type-v")
    per_slot = context if options.get("kv-unified") else context // slots
    where = "+".join(instance["devices"]) or "processor"
    title = f"{instance['name']}: {instance['node']} {where} ({instance['backend']}), {instance['fit']}"
    if instance.get("turns"):
        title += f" with {', '.join(instance['turns'])}"
    lines = [
        title,
        f"  {chosen['quant']}, {size:.1f} GB of files, port {instance['port']}, quality {instance['quality']:.3f}",
        f"  {per_slot} tokens x {slots}, kv {keys if keys == values else f'{keys}/{values}'}",
        *_wrapped("  " + " ".join(f"{key}={_word(value)}" for key, value in sorted(options.items())), "  "),
    ]
    places: dict[str, dict[str, int]] = {}
    for part in instance["parts"]:
        place = places.setdefault(part["where"], {})
        kind = part["kind"] if part["source"] == "computed" else f"{part['kind']} ({part['source']})"
        place[kind] = place.get(kind, 0) + part["bytes"]
    for place, total in instance["memory"].items():
        told = " + ".join(f"{kind} {size / (1 << 20):.1f}" for kind, size in places.get(place, {}).items() if size)
        lines += _wrapped(f"  {place} {total} = {told or 'nothing itemised'}", "    ")
    return lines


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _left(nodes: dict[str, Any], plan: dict[str, Any]) -> list[str]:
    weights: dict[tuple[str, str], float] = {}
    for instance in plan["instances"]:
        for part in instance["parts"]:
            if part["kind"] == "weights":
                place = instance["node"], part["where"]
                weights[place] = weights.get(place, 0) + part["bytes"] / (1 << 20)
    rows = [("memory", "size", "reserved", "others", "planned", "left", "weights alone")]
    for host, wheres in plan["devices"].items():
        names = {device["id"]: device["name"] for device in nodes[host]["devices"]}
        for where, sizes in wheres.items():
            keys = ("size_mib", "reserved_mib", "others_mib", "planned_mib", "left_mib")
            name = f"{host} {where}" + (f" ({names[where]})" if where in names else "")
            rows.append((name, *(str(sizes[key]) for key in keys), f"{weights.get((host, where), 0):.0f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    ]


def _wrapped(text: str, later: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=later, break_long_words=False, break_on_hyphens=False)
