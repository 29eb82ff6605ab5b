# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The synthetic models are models: the real server takes each of them for what it stands for."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.models import synthetic
from tests.oracle.oracle import Case, Oracle, OracleError

MIB = 1 << 20


def test_the_server_takes_every_model(tmp_path: Path) -> None:
    cases = []
    models = dict(list(synthetic.MODELS.items())[:: 1 if os.environ.get("WHOLE") else 3])
    for name, model in models.items():
        path = synthetic.model(name, model.quants[0], tmp_path)
        mode = "embedding" if "pooling_type" in model.values else "chat"
        cases.append(Case(path, {"ctx-size": 2048, "parallel": 1, "n-gpu-layers": "all", "batch-size": 2048}, 1, mode))
    with Oracle(tmp_path) as oracle:
        answers = oracle.ask_all(cases)
    refused = [str(answer) for answer in answers if isinstance(answer, OracleError)]
    assert not refused
    for (name, model), answer in zip(models.items(), answers):
        layers = model.layers - model.values.get("nextn_predict_layers", 0)
        assert answer.offloaded[1] in (layers + 1, model.layers + 1), name
        # All of the file is somewhere; a tied embedding twice. The engine prints whole MiB.
        size = synthetic.shape(name, model.quants[0])["weights_bytes"] / MIB
        held = sum(sizes.get("model", 0) + sizes.get("repack", 0) for sizes in answer.values())
        assert held >= size * 0.95 - 2, name


@pytest.mark.parametrize(
    ("name", "projector"),
    [("qwen2.5-vl-7b", "mmproj-qwen2.5-vl-7b"), ("gemma-3-12b", "mmproj-gemma-3-12b")],
)
def test_the_server_takes_a_projector(name: str, projector: str, tmp_path: Path) -> None:
    path = synthetic.model(name, "Q4_K_M", tmp_path)
    beside = synthetic.model(projector, "F16", tmp_path)
    options = {"ctx-size": 2048, "parallel": 1, "n-gpu-layers": "all", "mmproj": f"/models/{beside.name}"}
    with Oracle(tmp_path) as oracle:
        text = oracle.ask(path, options, devices=1).text
    # Its weights, and room to work.
    told = re.search(r"worst-case memory usage of mmproj is ([\d.]+) MiB", text)
    assert told and float(told[1]) > beside.stat().st_size / MIB
