# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Asks a lab's gateway one question and prints the answer while it comes: what `./lab ask` runs.

    ansible-inventory -i INVENTORY --list | python3 ask.py [--model NAME] [--random FILE] QUESTION

The inventory on standard input says where the gateway is and holds its key, which so never shows in a list of
processes. The environment variable LITELLM_MASTER_KEY is used instead where the inventory only has a lookup.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

KEY = "lab_secret_litellm_master_key"


def gateway(inventory: dict[str, Any]) -> tuple[str, str]:
    """Return address and key of the lab's LiteLLM."""
    hosts = inventory["_meta"]["hostvars"]

    def first(key: str) -> Any:
        return next((variables[key] for variables in hosts.values() if key in variables), None)

    service = (first("lab_services") or {}).get("litellm")
    if not service:
        raise SystemExit("ask: the lab declares no gateway. Add litellm to lab_services.")
    port = service.get("ports", {}).get("http", 4000)
    name = service.get("node", "")
    node = hosts.get(name, {})
    host = service.get("external") or node.get("node_address") or node.get("ansible_host") or name
    key = os.environ.get("LITELLM_MASTER_KEY") or first(KEY)
    if not isinstance(key, str) or "{{" in key:
        raise SystemExit(
            f"ask: {KEY} is not readable from the inventory. Deploy the lab first, or set LITELLM_MASTER_KEY."
        )
    return f"http://{host}:{port}/v1/chat/completions", key


def stream(url: str, key: str, model: str, question: str, limit: int) -> None:
    """Ask, and print the pieces of the answer as they come."""
    body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": limit, "stream": True}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=300) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            piece = json.loads(line[6:])
            if "error" in piece:
                raise SystemExit(f"\nask: {piece['error'].get('message', piece['error'])}")
            for choice in piece.get("choices", []):
                print(choice.get("delta", {}).get("content") or "", end="", flush=True)
    print()


def main() -> None:
    """Read the arguments and the inventory, ask."""
    parser = argparse.ArgumentParser(prog="lab ask", description="Ask the lab's gateway.")
    parser.add_argument("--model", default="chat", help="model or category (default: chat)")
    parser.add_argument("--tokens", type=int, default=512, help="longest answer (default: 512)")
    parser.add_argument("--random", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("question")
    words = parser.parse_args()
    url, key = gateway(json.load(sys.stdin))
    if words.random and words.random.exists() and words.model in words.random.read_text().split():
        warning = f"(no model hub was reached: {words.model} has random weights, its answers mean nothing)"
        print(warning, file=sys.stderr)
        words.tokens = min(words.tokens, 48)
    try:
        stream(url, key, words.model, words.question, words.tokens)
    except urllib.error.HTTPError as error:
        raise SystemExit(f"ask: {url} answers {error.code}: {error.read().decode(errors='replace')[:500]}") from error
    except OSError as error:
        raise SystemExit(f"ask: {url} does not answer ({error}). Look with: ./lab status") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
