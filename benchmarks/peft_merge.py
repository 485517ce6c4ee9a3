"""PEFT's own way of merging, as its documentation shows it: build the model, merge, save."""

from __future__ import annotations

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main() -> None:
    base, adapter, output, dtype, device = sys.argv[1:]
    place = {} if device == "cpu" else {"device_map": device}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype), **place)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(output)


if __name__ == "__main__":
    main()
