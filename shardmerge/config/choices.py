"""The choices of the config and the command line, in a module of their own: `--help` must not wait for pydantic."""

from __future__ import annotations

from typing import Literal

Format = Literal["safetensors", "gguf"]
Quantization = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"]
OutputDtype = Literal["same", "float32", "bfloat16", "float16"]
Quantized = Literal["auto", "mixed", "dense", "same"]
#: A device by its name in torch, which takes 300 for 44 and knows no 07.
DEVICE = r"^(auto|cpu|cuda(:(0|[1-9]\d?))?)$"
#: The same, to be printed.
DEVICES = ("auto", "cpu", "cuda", "cuda:1")
