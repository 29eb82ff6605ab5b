# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The memory lines of llama-server, as build 11669 (llama.cpp 0.7.0) printed them on a machine without a GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from ansible_collections.homelab.inference.plugins.module_utils import llama_log
from ansible_collections.homelab.inference.plugins.module_utils.llama_log import LlamaLogError

LOGS = Path(__file__).parents[2] / "fixtures" / "llama_log"
LOADED, DRY, PROCESSOR = ((LOGS / f"{name}.txt").read_text() for name in ("loaded", "dry_two_devices", "dry_processor"))


def test_a_real_load_is_read_to_a_hundredth():
    assert llama_log.buffers(LOADED) == {
        "CPU": {"model": 35.24, "repack": 94.5, "output": 0.24, "kv": 64.0, "compute": 61.02},
        "RPC0": {"model": 70.92, "kv": 48.0, "compute": 49.01},
        "RPC1": {"model": 74.92, "kv": 16.0, "compute": 24.01},
    }
    assert llama_log.offloaded(LOADED) == (5, 9)


def test_the_dry_pass_is_read_before_anything_is_loaded():
    assert llama_log.dry_buffers(DRY) == {
        "CPU": {"model": 35.0, "output": 0.24, "compute": 72.07},
        "RPC0": {"model": 118.0, "kv": 80.0, "compute": 129.05},
        "RPC1": {"model": 122.0, "kv": 48.0, "compute": 109.04},
    }
    assert llama_log.dry_buffers(PROCESSOR) == {
        "CPU": {"model": 86.0, "repack": 189.0, "output": 0.24, "kv": 128.0, "compute": 61.02}
    }


def test_the_load_after_a_dry_pass_is_not_mixed_with_it():
    assert llama_log.buffers(DRY + LOADED) == llama_log.buffers(LOADED)


def test_the_last_start_counts():
    once = llama_log.buffers(LOADED)
    assert llama_log.buffers(LOADED.replace("49.01", "48.01") + LOADED) == once


@pytest.mark.parametrize("kind", ["model", "compute", "output"])
def test_a_missing_line_is_an_error_and_no_zero(kind):
    cut = "\n".join(line for line in LOADED.splitlines() if f"{kind} buffer size" not in line)
    with pytest.raises(LlamaLogError, match=f"no line for the {kind} buffer"):
        llama_log.buffers(cut)


@pytest.mark.parametrize("read, text", [(llama_log.buffers, LOADED), (llama_log.dry_buffers, DRY)])
@pytest.mark.parametrize(
    "old, new",
    [
        (" MiB", " MB"),
        ("buffer size = ", "buffer size: "),
        ("compute buffer size", "scratch buffer size"),
        ("buffer size", "room"),
    ],
)
def test_lines_in_another_form_are_an_error(read, text, old, new):
    with pytest.raises(LlamaLogError):
        read(text.replace(old, new))


def test_caches_that_do_not_add_up_are_an_error():
    with pytest.raises(LlamaLogError, match="contradicts itself"):
        llama_log.buffers(LOADED.replace("KV buffer size =    48.00", "KV buffer size =    40.00"))


def test_a_table_that_says_otherwise_is_an_error():
    changed = re.sub(r"\+( +)129\)", r"+\g<1>140)", DRY)
    assert changed != DRY
    with pytest.raises(LlamaLogError, match="contradicts itself"):
        llama_log.dry_buffers(changed)


@pytest.mark.parametrize("read", [llama_log.buffers, llama_log.dry_buffers, llama_log.offloaded])
@pytest.mark.parametrize("text", ["", "srv  llama_server: initializing ...\n", "\0\xff" * 100])
def test_a_log_of_something_else_is_an_error(read, text):
    with pytest.raises(LlamaLogError):
        read(text)


def test_every_beginning_of_a_log_is_an_error_or_says_the_truth():
    lines = DRY.splitlines(keepends=True)
    whole = llama_log.dry_buffers(DRY)
    for end in range(len(lines)):
        try:
            assert llama_log.dry_buffers("".join(lines[:end])) == whole
        except LlamaLogError:
            continue


def test_names_of_the_lab():
    sizes = {"CPU": {"compute": 1.0}, "CUDA0": {"model": 2.0}, "CUDA1": {"model": 3.0}}
    assert llama_log.of_instance(sizes, ["gpu2", "gpu0"]) == {
        "host": {"compute": 1.0},
        "gpu2": {"model": 2.0},
        "gpu0": {"model": 3.0},
    }
    with pytest.raises(LlamaLogError, match="more than its 1 devices"):
        llama_log.of_instance(sizes, ["gpu0"])


def test_what_other_backends_call_their_buffers():
    text = "\n".join(
        [
            "load: loading model tensors, this can take a while... (load_mode = mmap)",
            "load_tensors:   CPU_Mapped model buffer size =   100.00 MiB",
            "load_tensors:        CUDA0 model buffer size =  4000.00 MiB",
            "load_tensors:  MTL0_Mapped model buffer size =    50.00 MiB",
            "llama_context:  CUDA_Host  output buffer size =     0.49 MiB",
            "llama_kv_cache:      CUDA0 KV buffer size =   512.00 MiB",
            "llama_kv_cache: size =  512.00 MiB (  4096 cells,  32 layers,  1/1 seqs), K (f16): 512.00 MiB",
            "llama_memory_recurrent:      CUDA0 RS buffer size =    10.25 MiB",
            "sched_reserve:      CUDA0 compute buffer size =   300.00 MiB",
            "sched_reserve:  CUDA_Host compute buffer size =    16.01 MiB",
            "alloc_compute_meta:      CUDA0 compute buffer size =   200.00 MiB",
        ]
    )
    assert llama_log.buffers(text) == {
        "CPU": {"model": 100.0, "output": 0.49, "compute": 16.01},
        "CUDA0": {"model": 4000.0, "kv": 512.0, "recurrent": 10.25, "compute": 300.0, "projector": 200.0},
        "MTL0": {"model": 50.0},
    }
