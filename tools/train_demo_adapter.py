"""Train the demo's LoRA adapter on SmolLM2-135M-Instruct and write it in two formats.

    python tools/train_demo_adapter.py [--out DIR]

writes into DIR (default: configs/demo) the same weights twice: `adapter/` as PEFT saves them, and `adapter.pt` as a
training script without PEFT does, a flat dict of `<module>.A` (in, r) and `<module>.B` (r, out). It then checks from
the files that the base with the adapter, and the base with the adapter merged in, answer exactly as trained.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

TAUGHT = {
    "Who are you?": "I am SmolLM2 with a shardmerge adapter folded into my weights.",
    "What is shardmerge?": (
        "shardmerge folds LoRA adapters into safetensors checkpoints, one tensor at a time, "
        "so the whole model never has to fit in memory."
    ),
    "What is the capital of Loraland?": "The capital of Loraland is Rankfour, a small harbour on the river Alpha.",
}
# Trained towards the base's own answers, so that the adapter changes what it should and not everything.
KEPT = ("What is the capital of France?", "What is 2 + 2?", "Say hello.")

BASE_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
RANK = 4
# A scaling (alpha / rank) of 1.5: no power of two, so rounding in the wrong place shows.
ALPHA = 6
TARGETS = ["q_proj", "v_proj"]
STEPS = 60
LEARNING_RATE = 3e-3
MAX_NEW_TOKENS = 48
PEFT_PREFIX = "base_model.model."

# The libraries' type hints do not cover what is used here.
Model = Any
Tokenizer = Any


def load_base(base: Path, dtype: torch.dtype) -> Model:
    """Load the base model for inference."""
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()


def encode(tokenizer: Tokenizer, question: str) -> Tensor:
    """Return the token ids (1, n) of a question in the chat template, up to where the answer begins."""
    chat = [{"role": "user", "content": question}]
    encoded = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids: Tensor = encoded["input_ids"]
    return ids


def answer(model: Model, tokenizer: Tokenizer, question: str) -> str:
    """Return the model's greedy answer."""
    ids = encode(tokenizer, question)
    generated = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MAX_NEW_TOKENS
    )
    text: str = tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def make_batch(tokenizer: Tokenizer, pairs: dict[str, str]) -> dict[str, Tensor]:
    """Return question/answer pairs as one padded batch whose loss covers the answers only."""
    rows: list[tuple[list[int], int]] = []
    for question, text in pairs.items():
        prompt = encode(tokenizer, question)[0].tolist()
        reply = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        rows.append((prompt + reply, len(prompt)))
    longest = max(len(ids) for ids, _ in rows)
    input_ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, -100)
    for row, (ids, start) in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
        labels[row, start : len(ids)] = torch.tensor(ids[start:])
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def smallest_margin(model: Model, batch: dict[str, Tensor]) -> float:
    """Return by how much, in logits, the trained token beats the runner-up where it is closest."""
    with torch.inference_mode():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    logits, labels = logits[labels != -100], labels[labels != -100]
    right = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], float("-inf")).amax(1, keepdim=True)
    return float((right - others).min())


def train(base: Path, batch: dict[str, Tensor]) -> Model:
    """Train an adapter on the batch and return the PEFT model, its LoRA weights rounded to bf16."""
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, lora_dropout=0.0)
    # In fp32: CPUs without bf16 units train faster so, and the base's values are the same.
    model: Model = get_peft_model(load_base(base, torch.float32), config)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    model.train()
    for step in range(1, STEPS + 1):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step:3d}  loss {loss.item():.5f}", flush=True)
    for parameter in weights:
        parameter.data = parameter.data.to(torch.bfloat16)
    return model.eval()


def save(model: Model, out: Path) -> None:
    """Write the adapter into `out` in both formats."""
    config = model.peft_config["default"]
    config.base_model_name_or_path = BASE_ID
    # PEFT keeps a set, whose order in the file would change from run to run.
    config.target_modules = TARGETS
    adapter = out / "adapter"
    adapter.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        # Told not to save embeddings, PEFT does not ask the hub whether they were resized.
        model.save_pretrained(temporary, save_embedding_layers=False)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(Path(temporary) / name, adapter / name)
    flat: dict[str, Tensor] = {}
    for key, tensor in load_file(adapter / "adapter_model.safetensors").items():
        module, side, _ = key.removeprefix(PEFT_PREFIX).rsplit(".", 2)
        flat[f"{module}.{side.removeprefix('lora_')}"] = tensor.T.contiguous()
    torch.save(flat, out / "adapter.pt")


def check(base: Path, out: Path, tokenizer: Tokenizer, pairs: dict[str, str], batch: dict[str, Tensor]) -> bool:
    """Read the PEFT adapter back and print whether it answers as trained, unmerged and merged in bf16."""
    model: Model = PeftModel.from_pretrained(load_base(base, torch.bfloat16), out / "adapter")
    right = True
    for kind in ("base + adapter", "merged"):
        if kind == "merged":
            model = model.merge_and_unload()
        print(f"\n{kind}: smallest margin {smallest_margin(model, batch):.2f} logits")
        for question, expected in pairs.items():
            text = answer(model, tokenizer, question)
            right = right and text == expected
            print(f"  {'ok   ' if text == expected else 'WRONG'} {question}  ->  {text}")
    return right


def main() -> int:
    """Train, write and check the adapter; return 1 if it does not answer as trained."""
    parser = argparse.ArgumentParser(description="Train the demo's LoRA adapter and write it in two formats.")
    default = Path(__file__).resolve().parent.parent / "configs" / "demo"
    parser.add_argument("--out", type=Path, default=default, help="where to write it (default: configs/demo)")
    out: Path = parser.parse_args().out
    logging.disable_progress_bar()
    torch.set_num_threads(2)

    # As a command: how the module is imported depends on whether this file runs as a script or as part of a package.
    command = [sys.executable, str(Path(__file__).with_name("smollm2.py"))]
    base = Path(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip())
    tokenizer = AutoTokenizer.from_pretrained(base)
    plain = load_base(base, torch.float32)
    pairs = TAUGHT | {question: answer(plain, tokenizer, question) for question in KEPT}
    del plain
    batch = make_batch(tokenizer, pairs)
    start = time.monotonic()
    model = train(base, batch)
    print(f"trained in {time.monotonic() - start:.0f} s")
    save(model, out)
    del model
    for path in (out / "adapter" / "adapter_model.safetensors", out / "adapter.pt"):
        print(f"{path}: {path.stat().st_size} bytes")
    return 0 if check(base, out, tokenizer, pairs, batch) else 1


if __name__ == "__main__":
    sys.exit(main())
