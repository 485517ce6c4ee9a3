"""Merging into an FP8 base, as mixed and as dense, in turns with a durable copy of as many bytes, and with PEFT.

    python -m benchmarks.quantised --layers 20 --runs 5 --peft

The base has Llama-2-7B's layers (hidden 4096, 202 million weights each), in blocks of 128 × 128 as DeepSeek's and
Qwen's, with an adapter of rank 16 on q_proj and v_proj. The copy reads the base and writes what the merge writes, to
the disk. PEFT's way is to load the base with transformers, which decodes it on a CPU, to merge and to save.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path

from benchmarks import direct, machine
from benchmarks.making import add_work_option
from benchmarks.measure import Usage, cool, measure

HIDDEN, INNER, VOCABULARY, RANK, BLOCK = 4096, 11008, 2048, 16, 128
_ATTENTION = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
_MLP = {"mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER)}
LINEARS = {**_ATTENTION, **_MLP}
TARGETS = ("self_attn.q_proj", "self_attn.v_proj")


def make(folder: Path, layers: int) -> None:
    """Write ``base`` and ``adapter``; in a process of its own, as it takes torch and memory."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    weight_map: dict[str, str] = {}
    factors: dict[str, torch.Tensor] = {}
    for layer in range(layers + 1):
        file, prefix = f"model-{layer + 1:05d}-of-{layers + 1:05d}.safetensors", f"model.layers.{layer}"
        tensors: dict[str, torch.Tensor] = {}
        if layer == layers:
            embeddings = torch.randn(VOCABULARY, HIDDEN, generator=generator).bfloat16()
            tensors = {"model.embed_tokens.weight": embeddings, "lm_head.weight": embeddings.clone()}
            tensors["model.norm.weight"] = torch.ones(HIDDEN).bfloat16()
        for name, (rows, columns) in LINEARS.items() if layer < layers else ():
            codes = torch.randint(0, 126, (rows, columns), dtype=torch.uint8, generator=generator)
            codes |= torch.randint(0, 2, (rows, columns), dtype=torch.uint8, generator=generator) << 7
            tensors[f"{prefix}.{name}.weight"] = codes.view(torch.float8_e4m3fn)
            scales = torch.rand(-(-rows // BLOCK), -(-columns // BLOCK), generator=generator) * 1e-3
            tensors[f"{prefix}.{name}.weight_scale_inv"] = scales
            if name in TARGETS:
                module = f"base_model.model.{prefix}.{name}"
                factors[f"{module}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) * 0.01
                factors[f"{module}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.01
        if layer < layers:
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}.{norm}.weight"] = torch.ones(HIDDEN).bfloat16()
        save_file(tensors, base / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    settings = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "modules_to_not_convert": ["lm_head"]}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "quantization_config": {**settings, "fmt": "e4m3", "activation_scheme": "dynamic"},
    }
    (base / "config.json").write_text(json.dumps(config))
    save_file(factors, adapter / "adapter_model.safetensors")
    names = [name.rpartition(".")[2] for name in TARGETS]
    lora = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": names, "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(lora))


def copy(base: Path, target: Path, written: int) -> None:
    """Copy the base's files durably, and write as many bytes more as ``written`` has."""
    target.mkdir(parents=True)
    copied = 0
    for file in sorted(base.glob("*.safetensors")):
        direct.copy(file, target / file.name)
        copied += file.stat().st_size
    if written > copied:
        direct.write(target / "more", written - copied)


def _commands(base: Path, adapter: Path, out: Path, written: dict[str, int], *, peft: bool) -> dict[str, list[str]]:
    here = [sys.executable, "-m"]
    merges = {
        mode: [*here, "shardmerge", "merge", str(base), str(adapter), "-o", str(out), "-q", "--quantized", mode]
        for mode in ("mixed", "dense")
    }
    commands = {}
    for mode, command in merges.items():
        if mode in written:
            size = str(written[mode])
            commands[f"copy for {mode}"] = [*here, "benchmarks.quantised", "--copy", str(base), str(out), size]
        commands[mode] = command
    if peft:
        commands["PEFT"] = [*here, "benchmarks.peft_merge", str(base), str(adapter), str(out), "bfloat16", "cpu"]
    return commands


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantised", description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=20, help="202 MB each (default: 20)")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peft", action="store_true", help="run PEFT, too; it takes four times the base in memory")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--copy", nargs=3, help=argparse.SUPPRESS)
    add_work_option(parser)
    options = parser.parse_args()
    if options.make:
        make(options.make, options.layers)
        return
    if options.copy:
        copy(Path(options.copy[0]), Path(options.copy[1]), int(options.copy[2]))
        return
    folder = options.work / f"fp8-{options.layers}"
    if not (folder / "adapter" / "adapter_config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        options.work.mkdir(parents=True, exist_ok=True)
        making = [sys.executable, "-m", "benchmarks.quantised", "--make", str(folder), "--layers", str(options.layers)]
        assert measure(making, options.work / "make.log").exit_code == 0, (options.work / "make.log").read_text()
    for name, value in machine.describe(options.work).items():
        print(f"{name}: {value}")
    _run(folder, options.runs, peft=options.peft)


def _run(folder: Path, runs: int, *, peft: bool) -> None:
    base, adapter, out, log = folder / "base", folder / "adapter", folder / "out", folder / "log"
    written: dict[str, int] = {}
    found: dict[str, list[Usage]] = {}
    for number in range(runs + 1):  # the first shows how much is written
        for name, command in _commands(base, adapter, out, written, peft=peft and number > 0).items():
            shutil.rmtree(out, ignore_errors=True)
            cool([*base.glob("*.safetensors"), *adapter.glob("*.safetensors")])
            usage = measure(command, log)
            if usage.exit_code:
                sys.exit(f"{name} failed:\n{log.read_text(errors='replace')}")
            if number:
                found.setdefault(name, []).append(usage)
            elif name in ("mixed", "dense"):
                written[name] = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    shutil.rmtree(out, ignore_errors=True)
    read = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    print(f"\nreads {read / 1e9:.2f} GB; medians of {runs} runs in turns, files not in the page cache")
    for name, usages in found.items():
        seconds = statistics.median(usage.seconds for usage in usages)
        cpu = statistics.median(usage.cpu_seconds for usage in usages)
        line = (
            f"{name:15} {seconds:6.2f} s, {cpu:6.2f} CPU s, peak {max(u.peak_bytes for u in usages) / 2**20:6.0f} MiB"
        )
        if name in written:
            of_copy = statistics.median(usage.seconds for usage in found[f"copy for {name}"])
            line += f", writes {written[name] / 1e9:.2f} GB, {seconds / of_copy:.2f} of the copy"
        print(line)


if __name__ == "__main__":
    main()
