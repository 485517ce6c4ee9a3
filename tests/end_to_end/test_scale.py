"""What a plan, a merge and its proof take for each of very many targets."""

from __future__ import annotations

import cProfile
import gc
import json
import pstats
import sys
from pathlib import Path

import pytest

import shardmerge
from tests.support.builders import run_python
from tests.support.many_experts import ManyExperts

MIB = 1 << 20
#: With DeepSeek-V3's and Kimi K2's number of targets.
LARGE = {"DeepSeek-V3": ManyExperts(61, 256, dense=3), "Kimi K2": ManyExperts(61, 384)}

#: Runs the command line and prints the most memory that the process has had.
_PEAK = """
import os, sys
from shardmerge.cli.main import main
from shardmerge.system.memory_use import peak_memory
def leave(code):
    print(peak_memory(), file=sys.stderr, flush=True)
    sys.stdout.flush()
    real(code)
real, os._exit = os._exit, leave
main()
"""


def peak_of(*arguments: str) -> int:
    done = run_python("-c", _PEAK, *arguments)
    assert done.returncode == 0, done.stderr
    return int(done.stderr.splitlines()[-1])


def peak_of_torch() -> int:
    done = run_python("-c", "import torch; from shardmerge.system.memory_use import peak_memory; print(peak_memory())")
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what is resident")
@pytest.mark.parametrize("model", LARGE)
def test_memory_hardly_grows_with_the_number_of_targets(model: str, tmp_path: Path) -> None:
    config = str(LARGE[model].write(tmp_path, shards=269))
    most = peak_of_torch() + 128 * MIB
    assert peak_of("plan", config, "--quiet") <= most
    for options in ([], ["--overwrite"]):
        peak = peak_of("run", config, "--quiet", *options)
        reported = json.loads((tmp_path / "merged" / "shardmerge.json").read_text())["memory"]["peak"]
        assert peak <= most
        # The record says what there was when its last part was written.
        assert abs(peak - reported) < 8 * MIB
    assert peak_of("verify", str(tmp_path / "merged"), "--quiet") <= most


def test_a_plan_leaves_nothing_behind(tmp_path: Path) -> None:
    """What it makes goes with it, without a search for cycles: during a merge of a large model, there is none."""
    config = ManyExperts(3, 8).write(tmp_path, shards=3)
    shardmerge.plan(config)  # what is made once, and stays
    gc.collect()
    gc.disable()
    try:
        shardmerge.plan(config)
        assert gc.collect() < TARGETS_OF_THREE_LAYERS, "objects in cycles"
    finally:
        gc.enable()


TARGETS_OF_THREE_LAYERS = 3 * 5 + 3 + 2 * (3 * 8 + 3)


def test_calls_for_each_target(tmp_path: Path) -> None:
    """The time of a plan, as the number of functions that it calls: a measure that no other process disturbs."""

    def calls(experts: int) -> tuple[int, int]:
        config = ManyExperts(4, experts).write(tmp_path / str(experts), shards=4)
        shardmerge.plan(config)
        profile = cProfile.Profile()
        plan = profile.runcall(shardmerge.plan, config)
        return sum(1 for _ in plan.updates()), pstats.Stats(profile).total_calls  # type: ignore[attr-defined]

    (few, calls_of_few), (many, calls_of_many) = calls(50), calls(150)
    assert many - few == 3 * 3 * 100
    assert (calls_of_many - calls_of_few) / (many - few) < MOST_CALLS


#: Of a target that is a whole tensor with LoRA.
MOST_CALLS = 215


def test_verify_imports_torch_when_all_else_is_read(tmp_path: Path) -> None:
    """The record and the plan, as objects, take as much memory as torch: they are gone when it comes."""
    config = ManyExperts(2, 4).write(tmp_path, shards=2)
    shardmerge.merge(shardmerge.plan(config))
    done = run_python("-c", _VERIFY, str(tmp_path / "merged"))
    assert (done.returncode, done.stdout) == (0, "False True\n"), done.stderr


_VERIFY = """
import sys
import shardmerge
from shardmerge.verification import verifier
plan_again, seen = verifier.plan_again, []
def seen_again(*given):
    result = plan_again(*given)
    seen.append("torch" in sys.modules)
    return result
verifier.plan_again = seen_again
shardmerge.verify(sys.argv[1]).raise_for_status()
print(*seen, "torch" in sys.modules)
"""
