# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Architectures whose computing the planner does not know: a bound at first, and what a start took from then on."""

from __future__ import annotations

import pytest
from ansible_collections.homelab.inference.plugins.module_utils import gguf
from ansible_collections.homelab.inference.plugins.module_utils.memory.calibration import fingerprint
from ansible_collections.homelab.inference.plugins.module_utils.memory.compute import compute, unknown
from ansible_collections.homelab.inference.plugins.plugin_utils import lab, planning

from tests.integration import architecture_files
from tests.oracle.oracle import Case, Oracle, OracleError

MIB = 1 << 20
COUNT = 8
OPTIONS = {"ctx-size": 8192, "parallel": 2, "kv-unified": False, "n-gpu-layers": "all", "flash-attn": "on"}
OPTIONS |= {"batch-size": 2048, "ubatch-size": 512, "swa-full": False, "cache-ram": 0, "ctx-checkpoints": 2}
DEVICES = [{"id": "card", "vendor": "emulated", "memory_mib": 8192}]


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """Per architecture the shape, and the MiB that a server which was really started took."""
    folder = tmp_path_factory.mktemp("tiny")
    strange, found = {}, {}
    for path in architecture_files.write_all(folder):
        if unknown(gguf.shape([gguf.read_file(path)])) and len(strange) < 3 * COUNT:
            larger = path.with_name(f"larger-{path.name}")
            architecture_files.Scaled(path, 8, 258 * MIB).write(larger)
            strange[path.stem] = (larger, gguf.shape([gguf.read_file(larger)]))
    with Oracle(folder) as oracle:
        answers = oracle.ask_all([Case(path, OPTIONS, 1, load=True) for path, _shape in strange.values()])
    for (name, (_path, shape)), answer in zip(strange.items(), answers):
        if not isinstance(answer, OracleError) and len(found) < COUNT:  # some have no cells for two slots
            found[name] = (shape, answer)
    for path in folder.iterdir():
        path.unlink()
    assert len(found) == COUNT
    return found


def sizes(shape, options, known=None):
    return {
        part["where"]: (part["bytes"] / MIB, part["source"])
        for part in compute(shape, options, DEVICES, "emulated", known)
        if part["kind"] == "compute"
    }


def test_what_a_start_took_stands_in_for_the_bound(starts):
    closer = 0
    for name, (shape, answer) in starts.items():
        took = {"card": answer["gpu0"], "host": answer["host"]}
        seen = {"model": "chat", "devices": ["card"], "shape": fingerprint(shape), "server_options": OPTIONS}
        seen |= {"image_id": "sha256:1", "memory": took}
        models = {"chat": lab.normal_model("chat", {"source": {"hf": "owner/name"}})}
        files = {"model": "chat", "files": [{"name": "chat.gguf", "size": 1}], "shape": shape}
        resolved = planning.resolve(models, [files], {}, None, {"chat": seen})["chat"]

        bound, known = sizes(shape, OPTIONS), sizes(shape, OPTIONS, resolved["calibration"])
        for place, there in (("card", "gpu0"), ("host", "host")):
            measured = answer[there].get("compute", 0.0)
            assert bound[place][0] >= measured - 8, (name, place)
            assert known[place][0] == pytest.approx(measured, abs=1), (name, place)
            assert known[place][1] == "calibrated", (name, place)
        closer += bound["card"][0] > known["card"][0] + 1
        # Of fewer tokens it says that they take no more, and something; of more of them, of another number of slots or
        # of another file nothing.
        fewer = {**OPTIONS, "ctx-size": 2048}
        less = sizes(shape, fewer, resolved["calibration"])
        for place, (size, _source) in less.items():
            assert 0 < size <= min(known[place][0], sizes(shape, fewer)[place][0]), (name, place)
        assert set(less) == set(bound)
        for other in ({**OPTIONS, "parallel": 1}, {**OPTIONS, "ctx-size": 65536}):
            assert sizes(shape, other, resolved["calibration"]) == sizes(shape, other)
        stranger = {**files, "shape": {**shape, "embedding_length": shape["embedding_length"] * 2}}
        assert "calibration" not in planning.resolve(models, [stranger], {}, None, {"chat": seen})["chat"]
    print(f"{closer} of {len(starts)} bounds were more than 1 MiB above")
    assert closer
