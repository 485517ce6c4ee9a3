"""The tools that are compared: each a command that makes an output of a base and an adapter."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.shapes import Made

Command = Callable[["Task"], list[str]]

#: Tools whose output is a merged checkpoint.
MERGES = ("shardmerge", "peft", "mergekit")
ORACLE = "peft"


@dataclass(frozen=True, slots=True)
class Task:
    """What to merge, and where to. ``scratch`` is removed after the run, like the output."""

    made: Made
    output: Path
    scratch: Path


def shardmerge(task: Task) -> list[str]:
    config = task.scratch / "config.yaml"
    value = {
        "base": str(task.made.base),
        "adapters": [str(task.made.adapter)],
        "output": {"path": str(task.output)},
    }
    config.write_text(json.dumps(value))  # JSON is YAML
    return [sys.executable, "-m", "shardmerge", "run", str(config)]


def copy(task: Task) -> list[str]:
    return _then_sync(["cp", "-r", str(task.made.base), str(task.output)], task.output)


def import_torch(task: Task) -> list[str]:
    return [sys.executable, "-c", "import torch"]


def peft(task: Task) -> list[str]:
    folders = [str(folder) for folder in (task.made.base, task.made.adapter, task.output)]
    return _then_sync([sys.executable, "-m", "benchmarks.peft_merge", *folders], task.output)


def mergekit(python: str) -> Command:
    """mergekit under an interpreter that has it."""

    def command(task: Task) -> list[str]:
        config = task.scratch / "mergekit.yaml"
        model = {"model": str(task.made.base), "lora": str(task.made.adapter)}
        config.write_text(
            json.dumps({"merge_method": "passthrough", "models": [{"model": model}], "dtype": "bfloat16"})
        )
        cache = str(task.scratch / "lora-cache")
        options = ["--lora-merge-cache", cache, "--lora-merge-dtype", "bfloat16", "--no-copy-tokenizer", "--quiet"]
        run = [python, "-m", "mergekit.scripts.run_yaml", str(config), str(task.output), *options]
        return _then_sync(run, task.output)

    return command


def all_tools(mergekit_python: str | None) -> dict[str, Command]:
    tools: dict[str, Command] = {
        "shardmerge": shardmerge,
        "copy": copy,
        "import-torch": import_torch,
        "peft": peft,
    }
    if mergekit_python:
        tools["mergekit"] = mergekit(mergekit_python)
    return tools


def _then_sync(command: list[str], output: Path) -> list[str]:
    """Make the output durable, as shardmerge does by itself; else a tool would be done before the disk is."""
    script = 'out=$1; shift; "$@" && find "$out" -type f -exec sync {} +'
    return ["sh", "-c", script, "sh", str(output), *command]
