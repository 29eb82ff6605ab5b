# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The truth about memory: what the very llama-server of an image says that it takes.

    with Oracle(folder) as oracle:                      # one container, no network; folder is mounted read-only
        sizes = oracle.ask(folder / "m.gguf", {"ctx-size": 8192, "parallel": 1, "n-gpu-layers": "all"}, devices=1)
        sizes["gpu0"]["compute"], sizes["host"]["compute"]          # MiB
        answers = oracle.ask_all([Case(path, options, devices=2), ...])      # in order; a case that failed: OracleError

`ask` runs the server with the flags of production and `--fit on`, reads its dry pass (nothing is loaded, a file with
a hole in place of its tensors will do) and kills it: about 0.3 s a case. model and repack are whole MiB, rounded down.
`load=True` lets it load for real and reads those lines: 0.01 MiB everywhere, at the price of that memory; tensors may
be a hole. The devices are ggml-rpc-servers beside it, `gpu0` and so on, `host` is everything else.
Kinds: model, repack, kv, recurrent, output, compute (see llama_log.py); `Answer.text` is the log.
"""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ansible_collections.homelab.inference.plugins.module_utils import dry_pass, llama_log

IMAGE = "homelab-inference/llama.cpp:dev"
SECONDS = 60  # a case may take
LIMIT = "12g"  # what the container may take, so that a mistake does not take the machine


class OracleError(Exception):
    """The server refused, or its log could not be read."""


class Answer(dict):
    """Buffers by device and kind, in MiB."""

    text = ""
    offloaded = (0, 0)


@dataclass(frozen=True)
class Case:
    """One question."""

    model: Path
    options: Mapping[str, Any]
    devices: int = 0
    mode: str = "chat"
    load: bool = False


class Oracle:
    """A container in which many servers are asked, one after the other."""

    def __init__(self, folder: Path, image: str = IMAGE) -> None:
        self._folder, self._image = Path(folder).resolve(), image
        self._name = f"oracle-{secrets.token_hex(4)}"

    def __enter__(self) -> Oracle:
        return self

    def __exit__(self, *_error: object) -> None:
        subprocess.run(["docker", "rm", "-f", self._name], capture_output=True, check=False)

    def ask(
        self, model: Path, options: Mapping[str, Any], devices: int = 0, mode: str = "chat", load: bool = False
    ) -> Answer:
        """One case."""
        answer = self.ask_all([Case(model, options, devices, mode, load)])[0]
        if isinstance(answer, OracleError):
            raise answer
        return answer

    def ask_all(self, cases: Iterable[Case]) -> list[Answer | OracleError]:
        """All cases in one container, the answers in the same order."""
        cases = list(cases)
        lines = [
            dry_pass.case(number, self._file(case), case.options, case.devices, case.mode, case.load)
            for number, case in enumerate(cases)
        ]
        command = dry_pass.command(self._image, {str(self._folder): ""}, ("--memory", LIMIT, "--name", self._name))
        done = subprocess.run(
            command,
            input="\n".join(lines) + "\n",
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS * (1 + len(cases)),
            check=False,
        )
        if done.returncode:
            raise OracleError(f"The container ended with {done.returncode}: {done.stderr.strip()[-500:]}")
        texts = dry_pass.texts(done.stdout)
        if len(texts) != len(cases):
            raise OracleError(f"{len(texts)} of {len(cases)} cases were answered: {done.stderr.strip()[-500:]}")
        return [self._answer(case, text) for case, text in zip(cases, texts)]

    def _file(self, case: Case) -> str:
        return str(Path(case.model).resolve().relative_to(self._folder))

    def _answer(self, case: Case, text: str) -> Answer | OracleError:
        try:
            answer = Answer(dry_pass.buffers(text, case.devices, case.load))
            answer.offloaded = llama_log.offloaded(text)
        except llama_log.LlamaLogError as error:
            return OracleError(f"{case.model.name} {dict(case.options)}: {error}\n{text[-1500:]}")
        answer.text = text
        return answer
