"""Let llama.cpp answer from a GGUF file: python tools/ask_llama_cpp.py FILE "Who are you?" [--expect TEXT]

Prints the greedy answer. Exits 1 if it lacks the expected text.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

MAX_TOKENS = 48


def answer(file: Path, prompt: str) -> str:
    """The greedy answer of a model, with the chat template that its file carries."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx = 512
    parameters.sampling.temp = 0
    server: Any = xllamacpp.Server(parameters)
    message = {"role": "user", "content": prompt}
    done = server.handle_chat_completions({"messages": [message], "max_tokens": MAX_TOKENS, "temperature": 0})
    return str(done["choices"][0]["message"]["content"]).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description="Let llama.cpp answer from a GGUF file.")
    parser.add_argument("file", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--expect", default="", help="text that the answer must have")
    options = parser.parse_args()
    # llama.cpp tells its whole life on stderr.
    quiet, loud = os.open(os.devnull, os.O_WRONLY), os.dup(2)
    os.dup2(quiet, 2)
    try:
        text = answer(options.file, options.prompt)
    finally:
        os.dup2(loud, 2)
    print(f"\n> {options.prompt}\n  llama.cpp, {options.file.name}: {text}")
    failed = options.expect not in text
    if failed:
        print(f"FAILED: the answer lacks {options.expect!r}", file=sys.stderr)
    sys.stdout.flush()
    os._exit(failed)  # a server of llama.cpp may wait for itself for ever when it ends


if __name__ == "__main__":
    main()
