"""Keys of ``adapter_config.json`` that no method reads: why they say nothing, and what becomes of unknown ones.

PEFT drops a key that it does not know with a warning, and loads. That is a guess: the key may be of a later PEFT or of
a trainer that means something by it. So it is refused here, whatever its value: false and 0 may be as far from the
default as anything else. Only null passes, with which PEFT writes that an option is not set.

All fields of all of PEFT's configs from 0.2 to 0.21.2 are known to the methods that had them.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

#: Keys of every config that say nothing about the weights: who made it of what, and how it is to be run.
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
#: Keys of other programs that say nothing about the weights where the tensors are PEFT's: mlx-lm writes down all its
#: arguments, and ``transformers_version`` is what wrote a config. They are named in a note.
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
    """What is wrong with ``ignore_keys``: a key that is not there is a typing error; one that is read has a meaning."""
    for key in ignored:
        if key not in config:
            near = difflib.get_close_matches(key, list(config)[:1000], 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            yield f"ignore_keys names {key!r}, which adapter_config.json does not have{hint}"
        elif key in read:
            yield f"ignore_keys names {key!r}, but this version knows what that does to the weights, and reads it"
