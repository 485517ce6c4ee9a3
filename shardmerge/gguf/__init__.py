"""GGUF, llama.cpp's file format: what a merged model's file looks like, and its bytes.

``model`` and ``layout`` say which tensors there are and what they are made of, ``metadata`` the key-values, ``writer``
the bytes before the data; none of them needs torch. ``tiles`` and ``quantize`` make the data, in torch.
"""

from __future__ import annotations

from shardmerge.gguf.files import too_large, wanted
from shardmerge.gguf.formats import QUANTIZATIONS, TYPES, GgmlType
from shardmerge.gguf.layout import Layout, OutputTensor, Part, lay_out
from shardmerge.gguf.metadata import Description, describe
from shardmerge.gguf.model import Model, read_model
from shardmerge.gguf.ollama import modelfile
from shardmerge.gguf.settings import losses, notes
from shardmerge.gguf.values import KeyValue
from shardmerge.gguf.writer import encode_header

__all__ = [
    "QUANTIZATIONS",
    "TYPES",
    "Description",
    "GgmlType",
    "KeyValue",
    "Layout",
    "Model",
    "OutputTensor",
    "Part",
    "describe",
    "encode_header",
    "lay_out",
    "losses",
    "modelfile",
    "notes",
    "read_model",
    "too_large",
    "wanted",
]
