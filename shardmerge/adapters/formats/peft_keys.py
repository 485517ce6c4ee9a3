"""Keys of tensors → modules and roles; and keys of ``adapter_config.json`` that no method reads.

PEFT drops an unknown key with a warning, and loads. That is a guess: the key may be of a later PEFT or of a trainer
that means something by it. So it is refused here, whatever its value: false and 0 may differ from the default. Only
null passes, by which PEFT writes that an option is not set.

The methods know all fields of their configs in PEFT 0.2 to 0.21.2.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache
from typing import Any

from shardmerge.key_mapping.naming import WRAPPER

#: Keys of every config that do not affect the weights: the origin of the adapter, and how to run it.
GENERAL = frozenset(
    {
        "auto_mapping",  # which classes load it
        "base_model_name_or_path",
        "inference_mode",
        "peft_type",  # it has chosen the method
        "peft_version",
        "revision",  # of the base; the report names it where it differs from the one at hand
        "runtime_config",  # where PEFT computes
        "task_type",
    }
)
#: Keys of other programs that do not affect the weights where the tensors are PEFT's: mlx-lm writes all its arguments,
#: transformers its version. A note names them.
FOREIGN = frozenset(
    {
        *("adapter_path", "batch_size", "config", "data", "fine_tune_type", "grad_accumulation_steps"),
        *("grad_checkpoint", "iters", "learning_rate", "lora_layers", "lora_parameters", "lr_schedule", "mask_prompt"),
        *("max_seq_length", "model", "num_layers", "optimizer", "optimizer_config", "project_name", "report_to"),
        *("resume_adapter_file", "save_every", "seed", "steps_per_eval", "steps_per_report", "test", "test_batches"),
        *("train", "transformers_version", "val_batches", "wandb"),
    }
)


def unknown_key(key: str, value: Any) -> str:
    """The message about an unknown key."""
    return (
        f"adapter_config.json: the key {key!r} is unknown to this version, and so is what it does to the weights "
        f"(found {reprlib.repr(value)}); if whoever made the adapter says that it does nothing to them, name it in the "
        "adapter's ignore_keys"
    )


def ignored_problems(ignored: Collection[str], config: Mapping[str, Any], read: Collection[str]) -> Iterator[str]:
    """The problems of ``ignore_keys``: a key that is missing is a typing error; one that is read has a meaning."""
    for key in ignored:
        if key not in config:
            near = difflib.get_close_matches(key, list(config)[:1000], 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            yield f"ignore_keys names {key!r}, which adapter_config.json does not have{hint}"
        elif key in read:
            yield f"ignore_keys names {key!r}, but this version knows what that does to the weights, and reads it"


def key_reader(roles: tuple[tuple[str, str], ...]) -> Callable[[str], tuple[str, str, str] | None]:
    """A function from a key to its module, its adapter's name and its role; None where it is not a factor's.

    ``lora_A.weight`` matches itself and ``lora_A.<adapter>.weight``; ``ia3_l`` itself and ``ia3_l.<adapter>``. A factor
    may be wrapped, too: ``lora_A.module.<adapter>.weight``, ``lora_A.<adapter>.module.weight``.
    """
    parts, names = [], []
    for index, (key, role) in enumerate(roles):
        factor, dot, end = key.partition(".")
        parts.append(
            rf"(?P<role{index}>{re.escape(factor)}(?:\.{WRAPPER})*?(?:\.(?P<adapter{index}>(?!weight$|bias$)[^.]+))??"
            rf"(?:\.{WRAPPER})*?{re.escape(dot + end)})"
        )
        names.append(role.removesuffix("?"))
    pattern = re.compile(rf"(?P<module>.+)\.(?:{'|'.join(parts)})")

    def read(key: str) -> tuple[str, str, str] | None:
        match = pattern.fullmatch(key)
        if match is None:
            return None
        index = int(str(match.lastgroup).removeprefix("role"))
        return match["module"], match[f"adapter{index}"] or "", names[index]

    @cache
    def read_end(factor: str, end: str) -> tuple[str, str] | None:
        """Adapter and role by the last two segments of a key, if the module is all that is before them."""
        found = read(f"_.{factor}.{end}")
        return None if found is None or found[0] != "_" else found[1:]

    def read_fast(key: str) -> tuple[str, str, str] | None:
        module, *ends = key.rsplit(".", 2)
        found = read_end(*ends) if module and len(ends) == 2 else None
        return read(key) if found is None else (module, *found)

    return read_fast
