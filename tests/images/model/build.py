# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fetches or writes the box's models: chat.gguf, code.gguf, embed.gguf.

    python3 tests/images/model/build.py DIRECTORY

Where a model hub is reached they are small published models, pinned by commit and digest. Else they are written here:
real GGUF files with random weights. What those say means nothing, how they are served is real; the file RANDOM beside
them names them.
"""

from __future__ import annotations

import hashlib
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

import gguf
import numpy as np

SEEDS = {"chat": 0, "code": 1, "embed": 2}
BUMP = "1"  # Change it with the content of the written files: they are written anew then.

HUB = "https://huggingface.co"
SMOLLM2 = (
    "bartowski/SmolLM2-360M-Instruct-GGUF/resolve/7be6f65f1db715fe5dc5a4634c0d459b4eed42ec/"
    "SmolLM2-360M-Instruct-Q4_K_M.gguf",
    "2fa3f013dcdd7b99f9b237717fa0b12d75bbb89984cc1274be1471a465bac9c2",
)
NOMIC_EMBED = (
    "nomic-ai/nomic-embed-text-v1.5-GGUF/resolve/0188c9bf409793f810680a5a431e7b899c46104c/nomic-embed-text-v1.5.Q8_0.gguf",
    "3e24342164b3d94991ba9692fdc0dd08e3fd7362e0aacc396a9a5c54a544c3b7",
)

VOCABULARY = """
a about above after again all along also always and another answer any are around as ask at away back be because before
begin best better between both box but by call can card chat close cloud come copy could count day deep do does done
door down each early east end even every far fast few field find fire first five follow for four free from full gate
give go good grow half hand hard have hear help here high hold home hour house how if in into is it keep kind know
large last late layer lead learn leave left less let light like line list little live load long look low machine make
many may mean memory might mind model moon more morning most move much must name near need never new next night no node
north not now of off old on once one only open or other our out over own part path place plan play point port put quick
quiet rain read ready real rest right river road room round run same say sea see send server set seven share she ship
short should show side simple since six sky slow small so some song soon sound south spring stand star start state stay
step still stone stop story such sun take talk tell ten than that the their then there these they thing think this
those three through time to today together token too tree true try turn two under until up us use very wait walk want
warm was watch water way we week well west what when where which while white who why will wind winter wise with word
work world would year yes you young your
"""
WORDS = VOCABULARY.split()

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def chat_model(path: Path, name: str, seed: int) -> None:
    """A two-layer llama whose vocabulary is bytes and a few hundred words; only words come out of it."""
    width, layers, heads, feed_forward = 128, 2, 4, 256
    control = [(b"<unk>", gguf.TokenType.UNKNOWN), (b"<s>", gguf.TokenType.CONTROL), (b"</s>", gguf.TokenType.CONTROL)]
    tokens = [text for text, _kind in control]
    kinds = [int(kind) for _text, kind in control]
    tokens += [b"<0x%02X>" % byte for byte in range(256)]
    kinds += [int(gguf.TokenType.BYTE)] * 256
    silent = len(tokens)
    tokens += ["▁".encode() + word.encode() for word in WORDS]
    kinds += [int(gguf.TokenType.NORMAL)] * len(WORDS)

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_description("Random weights, for trying things out")
    writer.add_context_length(4096)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_dimension_count(width // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * silent + [-float(rank) for rank in range(len(WORDS))])
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)

    random = np.random.default_rng(seed)

    def weights(*shape: int) -> np.ndarray:
        return random.normal(0, 0.05, shape).astype(np.float32)

    writer.add_tensor("token_embd.weight", weights(len(tokens), width) * 20)
    output = weights(len(tokens), width) * 10
    output[:silent] = 0.0  # Bytes would come out as broken characters, and the end at once.
    writer.add_tensor("output.weight", output)
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for layer in range(layers):
        block = f"blk.{layer}"
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{block}.{norm}.weight", np.ones(width, np.float32))
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            writer.add_tensor(f"{block}.{part}.weight", weights(width, width))
        writer.add_tensor(f"{block}.ffn_gate.weight", weights(feed_forward, width))
        writer.add_tensor(f"{block}.ffn_up.weight", weights(feed_forward, width))
        writer.add_tensor(f"{block}.ffn_down.weight", weights(width, feed_forward))
    finish(writer)


def embedding_model(path: Path, name: str, seed: int) -> None:
    """A two-layer nomic-bert with mean pooling; its vocabulary is letters and a few hundred words."""
    width, layers, heads, feed_forward = 64, 2, 4, 128
    letters = [chr(code) for code in range(33, 127)]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    kinds = [int(gguf.TokenType.CONTROL)] * 5 + [int(gguf.TokenType.NORMAL)] * len(letters)
    # WordPiece: words and letters at the start of a word carry a mark, their continuations none.
    tokens += ["▁" + piece for piece in dict.fromkeys([*letters, *WORDS])]
    kinds += [int(gguf.TokenType.NORMAL)] * (len(tokens) - len(kinds))

    writer = gguf.GGUFWriter(path, "nomic-bert")
    writer.add_name(name)
    writer.add_description("Random weights, for trying things out")
    writer.add_context_length(2048)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(heads)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_rope_freq_base(1000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("bert")
    writer.add_token_type_count(2)
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(kinds)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(3)
    writer.add_sep_token_id(3)
    writer.add_mask_token_id(4)

    random = np.random.default_rng(seed)

    def weights(*shape: int) -> np.ndarray:
        return random.normal(0, 0.2, shape).astype(np.float32)

    def norm(stem: str) -> None:
        writer.add_tensor(f"{stem}.weight", np.ones(width, np.float32))
        writer.add_tensor(f"{stem}.bias", np.zeros(width, np.float32))

    writer.add_tensor("token_embd.weight", weights(len(tokens), width))
    writer.add_tensor("token_types.weight", weights(2, width))
    norm("token_embd_norm")
    for layer in range(layers):
        block = f"blk.{layer}"
        writer.add_tensor(f"{block}.attn_qkv.weight", weights(3 * width, width))
        writer.add_tensor(f"{block}.attn_output.weight", weights(width, width))
        norm(f"{block}.attn_output_norm")
        writer.add_tensor(f"{block}.ffn_gate.weight", weights(feed_forward, width))
        writer.add_tensor(f"{block}.ffn_up.weight", weights(feed_forward, width))
        writer.add_tensor(f"{block}.ffn_down.weight", weights(width, feed_forward))
        norm(f"{block}.layer_output_norm")
    finish(writer)


def finish(writer: gguf.GGUFWriter) -> None:
    """Write everything and close the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def fetch(path: Path, source: tuple[str, str]) -> None:
    """Fetch a published file; it is in place only when its digest holds."""
    address, sha256 = source
    digest = hashlib.sha256()
    with urllib.request.urlopen(f"{HUB}/{address}", timeout=5) as answer, path.open("wb") as file:
        total, done, told = int(answer.headers["Content-Length"]), 0, 0
        while block := answer.read(1 << 20):
            digest.update(block)
            file.write(block)
            done += len(block)
            if done * 10 // total > told:
                told = done * 10 // total
                print(f"{address.rsplit('/', 1)[1]}: {told * 10} % of {total / 1e6:.0f} MB", flush=True)
    if digest.hexdigest() != sha256:
        raise OSError(f"{address} has the digest {digest.hexdigest()} instead of {sha256}")


def main() -> None:
    """Make what is missing, each file whole or not at all."""
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    marker = directory / "RANDOM"
    bump, *random = marker.read_text().split() if marker.exists() else [BUMP]
    missing = [name for name in SEEDS if not (directory / f"{name}.gguf").exists() or (name in random and bump != BUMP)]
    for name in missing:
        target, partial = directory / f"{name}.gguf", directory / f"{name}.gguf.partial"
        partial.unlink(missing_ok=True)
        random = [other for other in random if other != name]
        try:
            if name == "code" and "chat" not in random:
                os.link(directory / "chat.gguf", partial)
            else:
                fetch(partial, NOMIC_EMBED if name == "embed" else SMOLLM2)
        except (OSError, TypeError, ValueError) as error:
            print(f"{name}.gguf: no model hub ({error}), so it gets random weights", flush=True)
            random.append(name)
            (embedding_model if name == "embed" else chat_model)(partial, f"box {name}", SEEDS[name])
        partial.replace(target)
        print(f"written {target}", flush=True)
    marker.write_text("\n".join([BUMP, *random]) + "\n")


if __name__ == "__main__":
    main()
