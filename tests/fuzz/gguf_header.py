# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Looks for headers that break the reader, guided by coverage; it ends at the first one and leaves it as a file.

    pip install atheris
    python3 tests/fuzz/gguf_header.py CORPUS -max_total_time=600

CORPUS is a folder that keeps what was found to lead somewhere new; real headers are put into it at the start.
"""

from __future__ import annotations

import importlib
import io
import json
import sys
import time
from pathlib import Path
from types import ModuleType

import atheris

ROOT = Path(__file__).resolve().parents[2]
SLOW = 1.0  # seconds
LARGEST = 1 << 18  # bytes of a header
SIZES = (None, 1 << 20, 1 << 62)


def load(folder: Path, name: str) -> ModuleType:
    """Import one file of the checkout, and forget it: PyPI's gguf has the reader's name."""
    sys.path.insert(0, str(folder))
    module = importlib.import_module(name)
    del sys.path[0], sys.modules[name]
    return module


def read(data: bytes) -> None:
    """A shape that can be written down, or the one error with one line, and neither slowly."""
    started = time.process_time()
    try:
        json.dumps(reader.shape([reader.read_header(io.BytesIO(data), SIZES[len(data) % 3])]), allow_nan=False)
    except reader.GGUFError as error:
        if "\n" in str(error):
            raise ValueError(f"more than one line: {error!r}") from error
    if time.process_time() - started > SLOW:
        raise TimeoutError(f"{time.process_time() - started:.1f} s for {len(data)} bytes")


def seed(corpus: Path) -> None:
    """Put a header of each known architecture into the corpus."""
    synthetic = load(ROOT / "tests" / "models", "synthetic")
    for name, model in (synthetic.MODELS | synthetic.PROJECTORS).items():
        (corpus / f"synthetic_{name}").write_bytes(synthetic.header(name, model.quants[0])[0][:LARGEST])


if __name__ == "__main__":
    with atheris.instrument_imports():
        reader = load(ROOT / "plugins" / "module_utils", "gguf")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    seed(folder)
    atheris.Setup([*sys.argv, f"-max_len={LARGEST}", f"-artifact_prefix={folder.parent}/"], read)
    atheris.Fuzz()
