# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Compute buffers beside the engine's own words, asked now: predicted from the header, and calibrated.

Needs Docker and the image that tests/images/llama.cpp/build makes. The models have the shape of known ones, and no
weights.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from ansible_collections.homelab.inference.plugins.module_utils import gguf
from ansible_collections.homelab.inference.plugins.module_utils.memory import compute as subject
from ansible_collections.homelab.inference.plugins.module_utils.memory.compute import compute

from tests.oracle.oracle import IMAGE, Case, Oracle

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "models"), str(ROOT / "tests" / "oracle")]
import record  # noqa: E402
import synthetic  # noqa: E402

MIB = 1 << 20
# One of each kind of graph.
MODELS = ("qwen3-30b-a3b", "gemma-3-12b", "nomic-embed-text-v1.5")
if os.environ.get("WHOLE"):
    MODELS += ("llama-3.2-1b", "deepseek-v3", "qwen3-next-80b-a3b")


def devices(count):
    return [{"id": f"gpu{index}", "vendor": "emulated", "memory_mib": 24576} for index in range(count)]


def predicted(shape, options, count, calibration=None):
    """MiB of the compute buffer by place, and where the numbers come from."""
    if shape["pooling"]:
        options = {**options, "embedding": True}
    parts = [
        part for part in compute(shape, options, devices(count), "emulated", calibration) if part["kind"] == "compute"
    ]
    return {part["where"]: part["bytes"] / MIB for part in parts}, {part["source"] for part in parts}


def model(name, folder):
    path = synthetic.model(name, synthetic.MODELS[name].quants[0], folder)
    return path, gguf.shape([gguf.read_file(path)])


@pytest.mark.parametrize("name", MODELS)
def test_the_engine_takes_what_the_header_says(name, tmp_path):
    path, shape = model(name, tmp_path)
    chance = random.Random(f"live {name}")
    rows = []
    for count, where in record.places(shape):
        slots = chance.choice([{"parallel": 1}, {"parallel": 3}, {"parallel": 5, "kv-unified": True}])
        if shape["pooling"]:  # the engine dies of a batch that is no multiple of its slots
            slots = {"parallel": 1}
        options = {"ctx-size": chance.choice([5000, 12288, 50000]), "ubatch-size": chance.choice([384, 640, 1024])}
        rows.append((count, {**options, **slots, **where, "flash-attn": chance.choice(["on", "on", "off"])}))
    with Oracle(tmp_path) as oracle:
        answers = oracle.ask_all([Case(path, options, count, record.mode(shape)) for count, options in rows])
    for (count, options), answer in zip(rows, answers):
        assert isinstance(answer, dict), answer
        said, sources = predicted(shape, options, count)
        assert sources == {"computed"}
        for place, sizes in answer.items():
            if sizes.get("compute", 0.0) > 0.1:
                # An encoder that is split may be told one vector of the batch too many.
                share = 0.08 if shape["pooling"] else 0.02
                assert said[place] == pytest.approx(sizes["compute"], rel=share, abs=0.5), (place, count, options)
                assert said[place] >= sizes["compute"] - 0.5


def test_what_is_laid_out_is_what_is_taken(tmp_path):
    """The dry pass is no other truth than the real load."""
    path, _shape = model("llama-3.2-1b", tmp_path)
    options = {"ctx-size": 2048, "parallel": 1, "n-gpu-layers": 8, "warmup": False}
    with Oracle(tmp_path) as oracle:
        dry, real = oracle.ask_all([Case(path, options, 1), Case(path, options, 1, load=True)])
    for place in ("host", "gpu0"):
        assert real[place]["compute"] == pytest.approx(dry[place]["compute"], abs=0.02)
        assert real[place]["kv"] == pytest.approx(dry[place]["kv"], abs=0.02)
        assert 0 <= real[place]["model"] - dry[place]["model"] < 1.01


def calibrate(path, options, count, image=IMAGE):
    """What the module says, as on a node."""
    arguments = {
        "paths": [str(path)],
        "calibrate": True,
        "image": image,
        "server_options": options,
        "device_count": count,
    }
    done = subprocess.run(
        ["ansible", "localhost", "-m", "homelab.inference.gguf_info", "-a", json.dumps(arguments), "-o"],
        env={
            **os.environ,
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_PYTHON_INTERPRETER": sys.executable,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.partition("=>")[2])


@pytest.mark.parametrize("count", [0, 2])
def test_calibrated_to_a_mib_for_other_contexts_and_batches_from_the_header_alone(count, tmp_path, monkeypatch):
    whole, shape = model("qwen3-30b-a3b", tmp_path)
    header = tmp_path / "header.gguf"
    with whole.open("rb") as source:
        header.write_bytes(source.read(gguf.read_file(whole).header_bytes))
    options = {"ctx-size": 32768, "parallel": 2, "ubatch-size": 1024}
    if count:
        options |= {"n-gpu-layers": "all", "tensor-split": [1, 1]}
    answer = calibrate(header, options, count)
    (known,) = answer["calibrations"]
    assert known["image"].startswith("sha256:")
    assert len(known["points"]) == 4
    assert [problem["path"] for problem in answer["problems"]] == [str(header)]  # it is no whole model
    # As if the architecture were new: what the rules say is far too much then.
    monkeypatch.delitem(subject.FAMILIES, "qwen3moe")
    rows = [
        {**options, "ctx-size": context, "ubatch-size": ubatch} for context in (12288, 24576) for ubatch in (640, 896)
    ]
    with Oracle(tmp_path) as oracle:
        taken = oracle.ask_all([Case(whole, row, count) for row in rows])
    for row, sizes in zip(rows, taken):
        said, sources = predicted(shape, row, count, known)
        bound, guessed = predicted(shape, row, count)
        assert (sources, guessed) == ({"calibrated"}, {"bound"})
        for place, found in sizes.items():
            assert said[place] == pytest.approx(found["compute"], abs=1.0), (place, row)
            assert bound[place] > found["compute"] + 1
    # Of other options it says nothing.
    assert predicted(shape, {**options, "flash-attn": "off"}, count, known)[1] == {"bound"}


def test_an_image_that_is_not_there_is_named(tmp_path):
    path, _shape = model("llama-3.2-1b", tmp_path)
    with pytest.raises(subprocess.CalledProcessError) as caught:
        calibrate(path, {"ctx-size": 2048}, 0, "homelab-inference/none:there-is")
    assert "Cannot calibrate with image homelab-inference/none:there-is" in caught.value.stdout
