"""A tensor of any other shape or dtype, a setting of any other value: the plan refuses or accepts, and never fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import shardmerge
from tests.support.family_oracle import write_case


class Small(nn.Module):
    """One matrix and one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 12)
        self.two = nn.Conv2d(4, 6, 3)


def _config(name: str, *targets: str, **settings: Any) -> Callable[[], Any]:
    def make() -> Any:
        import peft

        return getattr(peft, name)(target_modules=list(targets), **settings)

    return make


METHODS = {
    "ia3": _config("IA3Config", "one", "two", feedforward_modules=["two"]),
    "loha": _config("LoHaConfig", "one", "two", r=2, use_effective_conv2d=True),
    "lokr": _config("LoKrConfig", "one", "two", r=1),
    "adalora": _config("AdaLoraConfig", "one", "two", init_r=2, total_step=9),
    "vera": _config("VeraConfig", "one", r=2),
    "vera-seeded": _config("VeraConfig", "one", r=2, save_projection=False),
    "randlora": _config("RandLoraConfig", "one", r=2),
    "vblora": _config("VBLoRAConfig", "one", r=2, num_vectors=5, vector_length=4),
    "vblora-top": _config(
        "VBLoRAConfig", "one", r=2, num_vectors=5, vector_length=4, topk=3, save_only_topk_weights=True
    ),
    "miss": _config("MissConfig", "one", r=2),
    "bat": _config("MissConfig", "one", r=2, init_weights="bat"),
    "shira": _config("ShiraConfig", "one", r=1),
    "delora": _config("DeloraConfig", "one", r=2),
}
#: In the ordinary suite; most of what a plan reads is the same for all.
QUICK = ("lokr", "delora")
SHAPES = [(), (0,), (1,), (0, 3), (3, 0, 1), (5, 7), (1, 1, 1, 1), (2, 3, 4, 5, 6)]
VALUES = [None, True, -1, 1.5, 10**30, float("inf"), "x", [], [1], {}, {"one": "x"}, {"(": 1}]


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in METHODS]
)
def test_any_shape_and_any_setting(tmp_path: Path, method: str) -> None:
    case = write_case(tmp_path, METHODS[method](), make=Small)
    file, settings = case.adapter / "adapter_model.safetensors", case.adapter / "adapter_config.json"
    tensors, config = load_file(file), json.loads(settings.read_text())
    for name in tensors:
        for shape in SHAPES:
            for dtype in (torch.float32, torch.bool):
                save_file({**tensors, name: torch.ones(shape, dtype=dtype)}, file)
                _plan(case.base, case.adapter)
        save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
        _plan(case.base, case.adapter)
    save_file(tensors, file)
    assert _plan(case.base, case.adapter)
    for key in config.keys() - {"peft_type"}:
        for value in VALUES:
            settings.write_text(json.dumps({**config, key: value}))
            _plan(case.base, case.adapter)


def _plan(base: Path, adapter: Path) -> bool:
    """Whether it is accepted; anything but a refusal or a plan is an error."""
    try:
        shardmerge.plan({"base": str(base), "adapters": [str(adapter)], "output": {"path": f"{base}-out"}})
    except shardmerge.ShardmergeError:
        return False
    return True
