"""Weights that are rounded as QLoRA did it: updates without an adapter, and what they must give."""

from __future__ import annotations

import torch
from torch import Tensor

from shardmerge.adapters.methods.nf4_rounding import Nf4Rounding, RoundingSettings
from shardmerge.spec.updates import Region, Update
from tests.support import quantised_bnb
from tests.support.method_cases import Subject
from tests.support.peft_oracle import random

CASE = "NF4 rounding"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def update_of(weight: Tensor, double: bool, dtype: str = "BF16") -> Update:
    shape = (weight.shape[0], weight.shape[1])
    return Update(
        adapter=0,
        family=Nf4Rounding.name,
        module="m",
        target="m.weight",
        factors=(),
        scaling=1.0,
        rank=0,
        shape=shape,
        region=Region("m.weight", shape[0]),
        settings=RoundingSettings(double, dtype),
    )


def subjects() -> tuple[Subject, ...]:
    """Rows of 96 end within blocks; those of 128 do not."""
    weights = [random(320, columns, seed=columns, scale=0.02).bfloat16().float() for columns in (96, 128)]
    return tuple(Subject(update_of(weight, double), weight) for weight in weights for double in (True, False))


def rounded(weight: Tensor, kind: str) -> Tensor:
    """What `quantised_bnb` stores of a weight, read again and rounded to the weight's dtype."""
    return quantised_bnb.values_of(quantised_bnb.four_bits(weight, "nf4", kind == "nf4")).to(weight.dtype)
