"""What a merge takes is what its plan says, whatever it writes: measured in a process of its own, for the record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.making import Made, ensure
from benchmarks.shapes import Shape
from tests.support.builders import run_python
from tests.support.gguf_zoo import write_spm_tokenizer

#: Enough for the largest buffers, and weights that fill them.
SHAPE = Shape("working-set", layers=2, hidden=1024, ffn=8192, heads=16, kv_heads=4, vocab=2048)
#: What is measured may be off by this much, or by a tenth.
TOLERANCE = 4 << 20
#: Buffers must be smaller with it, but hold more than a tile, or the second thread has little to do.
LITTLE = 26_000_000
LITTLE_IN_FLOAT64 = 32_000_000
#: Keys of the config: what is written, and how it is worked out.
OUTPUTS: dict[str, dict[str, str]] = {
    "safetensors": {},
    **{
        name: {"output.format": "gguf", "output.quantization": name}
        for name in ("q8_0", "q5_0", "q4_1", "q5_1", "q4_0", "bf16", "f16", "f32")
    },
    "to-float32": {"output.dtype": "float32"},
    "by-chance": {"output.rounding": "stochastic"},
    "by-chance-to-float16": {"output.rounding": "stochastic", "output.dtype": "float16"},
    "in-bfloat16": {"compute.dtype": "bfloat16"},
    "in-float64": {"compute.dtype": "float64"},
    "in-float64-to-float32": {"compute.dtype": "float64", "output.dtype": "float32"},
    "in-float64-by-chance": {"compute.dtype": "float64", "output.rounding": "stochastic"},
}
#: Enough for six threads.
MUCH = 90_000_000
QUICK = [("q8_0", LITTLE, "auto"), ("in-float64", "auto", "auto")]
ROWS: list[tuple[str, str | int, str | int]] = [
    *(
        (out, memory, "auto")
        for out in OUTPUTS
        for memory in ("auto", LITTLE_IN_FLOAT64 if out.startswith("in-float64") else LITTLE)
    ),
    *((out, MUCH, threads) for out in OUTPUTS for threads in (1, 6)),
]

_MERGE = """
import json, sys, shardmerge
from shardmerge.system.limits import cores
config = json.loads(sys.argv[1])
plan = shardmerge.plan(config)
config["compute"]["threads"] = min(plan.memory.workers, cores())
print(plan.memory.total, shardmerge.plan(config).memory.total, shardmerge.merge(plan).working_set_bytes)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    made = ensure(SHAPE, tmp_path_factory.mktemp("working-set"))
    write_spm_tokenizer(made.base)
    return made


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    ("out", "memory", "threads"), [pytest.param(*row, marks=[] if row in QUICK else [pytest.mark.slow]) for row in ROWS]
)
def test_the_working_set_is_the_plans(
    out: str, memory: str | int, threads: str | int, made: Made, tmp_path: Path
) -> None:
    config: dict[str, Any] = {
        "base": str(made.base),
        "adapters": [str(made.adapter)],
        "output": {"path": str(tmp_path / "Model")},
        "compute": {"max_memory": memory, "threads": threads},
    }
    for key, value in OUTPUTS[out].items():
        section, _, name = key.partition(".")
        config[section][name] = value
    done = run_python("-c", _MERGE, json.dumps(config))
    assert done.returncode == 0, done.stderr
    planned, at_once, measured = map(int, done.stdout.split())
    tolerance = max(TOLERANCE, planned // 10)
    # Threads beyond the cores take turns, so what each has in between is not there at the same time.
    assert at_once - tolerance <= measured <= planned + tolerance
    if memory != "auto":
        assert planned <= int(memory)
        assert measured <= int(memory) + tolerance
