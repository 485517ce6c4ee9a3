"""The real llama.cpp, in a process of its own: a server that ends soon after it began may wait for itself for ever."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_WORKER = """
import json, os, sys, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.warmup, parameters.n_gpu_layers = sys.argv[1], 512, False, 0
server = xllamacpp.Server(parameters)
for request in map(json.loads, sys.argv[2:]):
    ask = server.handle_chat_completions if "messages" in request else server.handle_completions
    print(json.dumps(ask({"temperature": 0, **request})["choices"][0]))
print("DONE", flush=True)
os._exit(0)
"""


def ask_llama_cpp(file: Path, *requests: dict[str, Any]) -> list[dict[str, Any]]:
    """Load a GGUF file and give the first choice of every request's greedy answer.

    With ``messages`` a request is a chat, by the template in the file; with ``prompt`` it is the text as it is.
    """
    pytest.importorskip("xllamacpp")
    command = [sys.executable, "-c", _WORKER, str(file), *map(json.dumps, requests)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    *answers, last = done.stdout.splitlines() or [""]
    assert last == "DONE", done.stderr[-2000:]
    return [json.loads(answer) for answer in answers]
