"""The real llama.cpp, in a process of its own: a server that ends soon after it began may wait for itself for ever."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

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


_LOGITS = """
import json, os, sys, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.warmup, parameters.n_gpu_layers = sys.argv[1], False, 0
parameters.n_ctx, parameters.n_parallel, parameters.cpuparams.n_threads = int(sys.argv[3]), 1, 1
parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(parameters)
# The token that is taken must be shown at once, so that none is taken that ends the text or is half a character; the
# probabilities are those before that.
asked = {"prompt": json.loads(sys.argv[2]), "max_tokens": 1, "temperature": 0, "logit_bias": [[int(sys.argv[4]), 1e4]]}
answer = server.handle_completions({**asked, "logprobs": 1 << 20, "n_probs": 1 << 20, "post_sampling_probs": False})
found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
print(json.dumps([[token["id"], token["logprob"]] for token in found]))
print("DONE", flush=True)
os._exit(0)
"""


def next_token(file: Path, prompt: Sequence[int], context: int, shown: int = 296) -> torch.Tensor:
    """The logarithms of the next token's probabilities after a prompt of ids, in float64, by id.

    Keys and values are kept in float32, so that what is seen is what the file says. ``shown``: a token that is text.
    """
    pytest.importorskip("xllamacpp")
    command = [sys.executable, "-c", _LOGITS, str(file), json.dumps(list(prompt)), str(context), str(shown)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    *answers, last = done.stdout.splitlines() or [""]
    assert last == "DONE", done.stderr[-2000:]
    by_id = dict(json.loads(answers[-1]))
    return torch.tensor([by_id[token] for token in range(len(by_id))], dtype=torch.float64)


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
