"""Show that a merged checkpoint answers as its base with the adapter does, and not as the base alone.

    python tools/demo.py --base DIR --adapter DIR --merged DIR [--prompt TEXT ...]

Exits 1 if the merged checkpoint and base + adapter differ on any prompt, or if the adapter shows on none.
"""

from __future__ import annotations

import argparse
import gc
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

PROMPTS = ("Who are you?", "What is shardmerge?", "What is the capital of Loraland?")
MAX_NEW_TOKENS = 48


def answers(model_dir: Path, prompts: list[str], tokenizer: Any, adapter: Path | None = None) -> list[str]:
    """Return the greedy answers of a checkpoint, with a PEFT adapter attached to it if one is given."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto").eval()
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).eval()
    texts: list[str] = []
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.inference_mode():
            generated = model.generate(**ids, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        texts.append(tokenizer.decode(generated[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    # A model's modules refer to each other in cycles: without this the next one would be loaded beside it.
    del model
    gc.collect()
    return texts


def main(argv: list[str] | None = None) -> int:
    """Print the three models' answers; return 1 if they do not agree as they should."""
    parser = argparse.ArgumentParser(description="Compare a base, base + adapter and a merged checkpoint.")
    parser.add_argument("--base", type=Path, required=True, help="the base checkpoint's directory")
    parser.add_argument("--adapter", type=Path, required=True, help="the PEFT adapter's directory")
    parser.add_argument("--merged", type=Path, required=True, help="the merged checkpoint's directory")
    parser.add_argument("--prompt", action="append", help="a prompt instead of the default ones; may be repeated")
    args = parser.parse_args(argv)
    prompts: list[str] = args.prompt or list(PROMPTS)

    warnings.filterwarnings("ignore", category=FutureWarning)
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()

    tokenizer: Any = AutoTokenizer.from_pretrained(args.base)
    base = answers(args.base, prompts, tokenizer)
    adapted = answers(args.base, prompts, tokenizer, args.adapter)
    merged = answers(args.merged, prompts, tokenizer)

    for prompt, *texts in zip(prompts, base, adapted, merged, strict=True):
        print(f"\n> {prompt}")
        for label, text in zip(("base", "base + adapter", "merged"), texts, strict=True):
            print(textwrap.fill(text, 110, initial_indent=f"  {label + ':':<16}", subsequent_indent=" " * 18))
    print()
    different = [prompt for prompt, left, right in zip(prompts, adapted, merged, strict=True) if left != right]
    if different:
        print(f"FAILED: base + adapter and merged differ on: {' | '.join(different)}", file=sys.stderr)
        return 1
    if base == merged:
        print("FAILED: base and merged answer every prompt alike: the adapter shows on none", file=sys.stderr)
        return 1
    print("OK: the merged checkpoint answers as base + adapter does, and not as the base alone.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
