# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Writes the pages that are made from other files: the declaration's reference and JSON Schema, images, quality.

python3 docs/generate.py            write them
python3 docs/generate.py --check    say which are stale, and end with 1 if any is
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = ROOT / "plugins" / "plugin_utils" / "schema.yml"
QUALITY = ROOT / "plugins" / "module_utils" / "planner" / "quality.py"
NOTICE = "<!-- Made by docs/generate.py; edit {source} instead. -->\n\n"
INTRODUCTION = """\
# The declaration, key by key

An owner writes an ordinary Ansible inventory. The groups `control`, `inference` and `library` say what a host does; \
these variables say what differs from the defaults.
A single value is a promise: kept or refused. \
A list, where the table says so, is an order of preference: the first that fits wins.

"""


def resolved(entry: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """Return an entry with its reference filled in."""
    if "$ref" not in entry:
        return entry
    target = schema["$defs"][entry["$ref"].rsplit("/", 1)[-1]]
    return {**resolved(target, schema), **{key: value for key, value in entry.items() if key != "$ref"}}


def kind(entry: dict[str, Any], schema: dict[str, Any]) -> str:
    """Return the type of a key in words."""
    entry = resolved(entry, schema)
    if "const" in entry:
        return f"`{entry['const']}`"
    if "enum" in entry:
        return ", ".join(f"`{value}`" for value in entry["enum"])
    if "anyOf" in entry:
        return " or ".join(kind(one, schema) for one in entry["anyOf"])
    found = entry.get("type", "")
    found = " or ".join(one for one in found if one != "null") if isinstance(found, list) else found
    if found == "array":
        return f"list of {kind(entry.get('items', {}), schema) or 'values'}"
    return {"string": "text", "integer": "whole number", "object": "mapping", "boolean": "true or false"}.get(
        found, found
    )


def rows(properties: dict[str, Any], schema: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, ...]]:
    """Yield a row per key, those inside mappings after the mapping."""
    for key, entry in properties.items():
        entry = resolved(entry, schema)
        default = entry.get("x-default", "")
        examples = ", ".join(f"`{json.dumps(one, ensure_ascii=False)}`" for one in entry.get("examples", []))
        text = entry.get("description", "") + (" A list is an order of preference." if entry.get("x-ladder") else "")
        default = json.dumps(default) if isinstance(default, (list, dict)) else str(default)
        yield f"`{prefix}{key}`", kind(entry, schema), entry.get("x-unit", ""), text, default, examples
        if not prefix.startswith("node_gpus"):
            yield from rows(entry.get("properties", {}), schema, f"{prefix}{key}.")
            inner = (
                resolved(entry.get("additionalProperties") or entry.get("items") or {}, schema)
                if entry.get("type") in ("object", "array")
                else {}
            )
            if isinstance(inner, dict) and key != "lab_models":
                mark = "NAME" if entry.get("type") == "object" else "[]"
                inner = (
                    resolved(inner.get("items", {}), schema)
                    if inner.get("type") == "array" and inner.get("items", {}).get("properties")
                    else inner
                )
                yield from rows(inner.get("properties", {}), schema, f"{prefix}{key}.{mark}.".replace(".[]", "[]"))


def table(found: Iterator[tuple[str, ...]]) -> str:
    """Return rows as a Markdown table."""
    head = ("key", "type", "unit", "what it says", "when absent", "example")
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in found]
    return "\n".join(lines) + "\n"


def reference() -> str:
    """Return the reference of the declaration."""
    schema = yaml.safe_load(SCHEMA.read_text(encoding="utf-8"))
    lab = {key: entry for key, entry in schema["properties"].items() if key.startswith("lab_")}
    node = {key: entry for key, entry in schema["properties"].items() if key.startswith("node_")}
    return (
        NOTICE.format(source="plugins/plugin_utils/schema.yml")
        + INTRODUCTION
        + "## The lab (below `all.vars`)\n\n"
        + table(rows(lab, schema))
        + "\n## A model (`lab_models.NAME`)\n\n"
        + table(rows(schema["$defs"]["model"]["properties"], schema))
        + "\n## A node (host variables)\n\n"
        + table(rows(node, schema))
    )


def json_schema() -> str:
    """Return the schema as JSON, for editors."""
    return json.dumps(yaml.safe_load(SCHEMA.read_text(encoding="utf-8")), indent=2, ensure_ascii=False) + "\n"


def images() -> str:
    """Return the list of images, each from the default of its role."""
    lines = [
        NOTICE.format(source="roles/*/defaults/main.yml") + "# Images\n",
        "| role | variable | image |",
        "| --- | --- | --- |",
    ]
    for path in sorted((ROOT / "roles").glob("*/defaults/main.yml")):
        for name, value in (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).items():
            if name.endswith(("_image", "_images")):
                for key, image in value.items() if isinstance(value, dict) else [("", value)]:
                    lines.append(f"| {path.parts[-3]} | `{name}{'.' + key if key else ''}` | `{image}` |")
    return "\n".join(lines) + "\n"


def quality() -> str:
    """Return what a server is worth, from the table that the planner uses."""
    spec = importlib.util.spec_from_file_location("quality", QUALITY)
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    longest = max(len(row) for row in table.STEPS.values())
    lines = [
        NOTICE.format(source="plugins/module_utils/planner/quality.py") + "# What a server is worth\n",
        "The value of a plan is the sum of priority x quality of its servers. The planner takes the one worth most.",
        "Quality is the product of the factors below: one for each of the owner's lists, one for where a server runs.",
        "What an owner gives up first costs least: the whole list of quants less than one step of context, both less",
        "than one step of the KV type, the three less than one step of slots, the four less than leaving the GPU.\n",
        "| list | " + " | ".join(f"{number}." for number in range(1, longest + 1)) + " |",
        "| --- |" + " ---: |" * longest,
    ]
    lines += [
        f"| `{name}` | " + " | ".join(f"{factor:.3f}" for factor in row) + " |" for name, row in table.STEPS.items()
    ]
    lines += [
        f"\nEach further position of a list counts {table.AFTER_LAST} times the one before.\n",
        "| where it runs | quality |",
        "| --- | --- |",
    ]
    words = {
        "one_gpu": "one GPU",
        "split": "split over GPUs of one node",
        "experts_on_cpu": "GPU, experts on the processor (few to all)",
        "layers_on_cpu": "GPU, whole layers on the processor (few to most)",
        "cpu": "processor alone",
    }
    for name, (least, most) in table.FITS.items():
        factor = f"{least:.3f}" if least == most else f"{least:.3f} to {most:.3f}"
        lines.append(f"| {words[name]} | {factor} |")
    words = {"wanted": "takes turns, as its owner wishes first", "accepted": "takes turns, as its owner accepts"}
    for name, factor in table.TURNS.items():
        lines.append(f"| {words[name]} | {factor:.3f} x that of where it is when awake |")
    return "\n".join(lines) + "\n"


PAGES = {
    "declaration.md": reference,
    "declaration.schema.json": json_schema,
    "images.md": images,
    "quality.md": quality,
}


def main() -> int:
    """Write the pages, or check them."""
    words = argparse.ArgumentParser(description="Write the generated pages.")
    words.add_argument("--check", action="store_true", help="only say which pages are stale")
    check = words.parse_args().check
    stale = []
    for name, make in PAGES.items():
        path, text = ROOT / "docs" / name, make()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                path.write_text(text, encoding="utf-8")
    for name in stale:
        print(f"docs/{name} {'is stale; run python3 docs/generate.py' if check else 'written'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
