"""The tools that are compared: each a command that makes an output of a base and an adapter."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.making import Made
from benchmarks.runs import Setting

Command = Callable[["Task"], list[str]]

#: Tools whose output is a merged checkpoint.
MERGES = ("shardmerge", "peft", "mergekit")
#: Those that hold the whole model in memory.
WHOLE = ("peft", "mergekit")
ORACLE = "peft"
ONE_CORE = "shardmerge-one-core"
#: What is compared where storage does not bound a merge.
IN_MEMORY = ("shardmerge", ONE_CORE, "copy", "import-torch")


@dataclass(frozen=True, slots=True)
class Task:
    """What to merge, how, and where to. ``scratch`` is removed after the run, like the output."""

    made: Made
    setting: Setting
    output: Path
    scratch: Path

    @property
    def dtype(self) -> str:
        """The output's, by name: the bases are all bf16."""
        return "bfloat16" if self.setting.dtype == "same" else self.setting.dtype


def shardmerge(task: Task) -> list[str]:
    config = task.scratch / "config.yaml"
    value = {
        "base": str(task.made.base),
        "adapters": [str(task.made.adapter)],
        "output": {"path": str(task.output), "dtype": task.setting.dtype},
        "compute": {"device": task.setting.device, "dtype": task.setting.compute_dtype},
    }
    config.write_text(json.dumps(value))  # JSON is YAML
    return [sys.executable, "-m", "shardmerge", "run", str(config)]


def shardmerge_on_one_core(task: Task) -> list[str]:
    core = min(os.sched_getaffinity(0))
    return ["taskset", "--cpu-list", str(core), *shardmerge(task)]


def copy(task: Task) -> list[str]:
    return _then_sync(["cp", "-r", str(task.made.base), str(task.output)], task.output)


def import_torch(task: Task) -> list[str]:
    """With the CUDA context where there is a GPU: that, too, is a start-up that no merge avoids."""
    start = "import torch"
    if task.setting.device != "cpu":
        start += f"; torch.zeros(1, device={task.setting.device!r})"
    return [sys.executable, "-c", start]


def peft(task: Task) -> list[str]:
    folders = [str(folder) for folder in (task.made.base, task.made.adapter, task.output)]
    run = [sys.executable, "-m", "benchmarks.peft_merge", *folders, task.dtype, task.setting.device]
    return _then_sync(run, task.output)


def mergekit(python: str) -> Command:
    """mergekit under an interpreter that has it."""

    def command(task: Task) -> list[str]:
        config = task.scratch / "mergekit.yaml"
        model = {"model": str(task.made.base), "lora": str(task.made.adapter)}
        value = {"merge_method": "passthrough", "models": [{"model": model}], "dtype": task.dtype}
        config.write_text(json.dumps(value))
        cache = str(task.scratch / "lora-cache")
        options = ["--lora-merge-cache", cache, "--lora-merge-dtype", task.dtype, "--no-copy-tokenizer", "--quiet"]
        if task.setting.device != "cpu":
            options.append("--cuda")
        run = [python, "-m", "mergekit.scripts.run_yaml", str(config), str(task.output), *options]
        return _then_sync(run, task.output)

    return command


def direct(action: str, *options: str) -> Command:
    """``read``, ``write`` or ``copy``, of as many bytes as the base has."""

    def command(task: Task) -> list[str]:
        files = sorted(str(path) for path in task.made.base.glob("*.safetensors"))
        operands = {
            "read": files,
            "write": [str(task.output / "block"), str(task.made.base_bytes())],
            "copy": [*files, str(task.output)],
        }
        return [sys.executable, "-m", "benchmarks.direct", *options, action, *operands[action]]

    return command


def all_tools(mergekit_python: str | None) -> dict[str, Command]:
    """By name, in the order in which they take turns unless told otherwise."""
    tools: dict[str, Command] = {
        "shardmerge": shardmerge,
        "copy": copy,
        "import-torch": import_torch,
        "peft": peft,
    }
    if mergekit_python:
        tools["mergekit"] = mergekit(mergekit_python)
    tools |= {f"direct-{action}": direct(action) for action in ("read", "write")}
    return tools | {f"direct-{action}-huge": direct(action, "--huge") for action in ("read", "write", "copy")}


def tools_in_memory() -> dict[str, Command]:
    """By name, in the order in which they take turns."""
    return {name: {**all_tools(None), ONE_CORE: shardmerge_on_one_core}[name] for name in IN_MEMORY}


def _then_sync(command: list[str], output: Path) -> list[str]:
    """Make the output durable, as shardmerge does by itself; else a tool would be done before the disk is."""
    script = 'out=$1; shift; "$@" && find "$out" -type f -exec sync {} +'
    return ["sh", "-c", script, "sh", str(output), *command]
