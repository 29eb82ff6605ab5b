# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The synthetic models have the sizes of the published ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible_collections.homelab.inference.plugins.module_utils import gguf

from tests.models import synthetic

# Sizes of the published files in GB, as their repositories show them (bartowski, unsloth, ggml-org, nomic-ai).
PUBLISHED = {
    ("llama-3.2-1b", "Q4_K_M"): 0.81,
    ("llama-3.1-8b", "Q4_K_M"): 4.92,
    ("llama-3.1-8b", "Q8_0"): 8.54,
    ("llama-3.3-70b", "Q4_K_M"): 42.52,
    ("qwen2.5-coder-1.5b", "Q4_K_M"): 0.99,
    ("qwen2.5-7b", "Q4_K_M"): 4.68,
    ("qwen2.5-7b", "Q3_K_M"): 3.81,
    ("qwen2.5-14b", "Q4_K_M"): 8.99,
    ("qwen2.5-32b", "Q4_K_M"): 19.85,
    ("qwen2.5-32b", "IQ3_M"): 14.81,
    ("qwen3-8b", "Q4_K_M"): 5.03,
    ("qwen3-30b-a3b", "Q4_K_M"): 18.56,
    ("qwen3-coder-30b-a3b", "Q8_0"): 32.48,
    ("qwen3-coder-30b-a3b", "Q6_K"): 25.09,
    ("qwen3-next-80b-a3b", "Q4_K_M"): 48.5,
    ("gemma-3-12b", "Q4_K_M"): 7.30,
    ("gemma-3-27b", "Q4_K_M"): 16.55,
    ("gpt-oss-20b", "MXFP4"): 12.11,
    ("gpt-oss-120b", "MXFP4"): 63.39,
    ("deepseek-v3", "Q4_K_M"): 404.4,
    ("mistral-small-24b", "Q4_K_M"): 14.33,
    ("phi-4", "Q4_K_M"): 9.05,
    ("nomic-embed-text-v1.5", "F16"): 0.274,
    ("mmproj-qwen2.5-vl-7b", "F16"): 1.354,
    ("mmproj-gemma-3-12b", "F16"): 0.854,
}


@pytest.mark.parametrize(("name", "quant"), PUBLISHED, ids=":".join)
def test_a_file_has_the_published_size(name: str, quant: str) -> None:
    # A vocabulary is left out of the header here: it takes 2 to 12 MB of the published file.
    assert synthetic.header(name, quant)[1] / 1e9 == pytest.approx(PUBLISHED[name, quant], rel=0.004, abs=0.013)


def test_a_header_without_vocabulary_says_the_same_as_the_file(tmp_path: Path) -> None:
    path = synthetic.model("llama-3.2-1b", "Q4_K_M", tmp_path)
    assert path.name == "synthetic_llama-3.2-1b-Q4_K_M.gguf"
    assert gguf.shape([gguf.read_file(path)]) == synthetic.shape("llama-3.2-1b", "Q4_K_M")
    assert path.stat().st_blocks * 512 < 8 << 20 < path.stat().st_size


def test_a_split_model_says_the_same_as_the_whole(tmp_path: Path) -> None:
    first = synthetic.model("gpt-oss-20b", "MXFP4", tmp_path, split=5 << 30)
    paths = gguf.shard_paths(first)
    assert len(paths) == 3
    assert gguf.shape([gguf.read_file(path) for path in paths]) == synthetic.shape("gpt-oss-20b", "MXFP4")


@pytest.mark.parametrize("name", synthetic.MODELS)
def test_every_model_says_where_its_numbers_stand(name: str) -> None:
    model = synthetic.MODELS[name]
    assert model.source.startswith("https://")
    assert set(model.quants) <= set(synthetic.QUANTS)
    shape = synthetic.shape(name, model.quants[0])
    assert shape["architecture"] == model.architecture
    assert len(shape["block_bytes"]) == model.layers
