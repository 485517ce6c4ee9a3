"""Load models and tokenizers with transformers: from a local directory, quietly, and without running their code.

transformers and PEFT are an optional dependency, imported when they are needed.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardmerge.codecs.quantization import MLX_METHOD, MODELOPT_SETTINGS, quantization
from shardmerge.config import suggestions
from shardmerge.config.choices import DEVICE, DEVICES
from shardmerge.errors import ConfigError, FormatError, SourceError
from shardmerge.file_formats.checkpoint import open_checkpoint
from shardmerge.reporting.text import count
from shardmerge.sources.local import LocalSource
from shardmerge.system import json_text
from shardmerge.system.installation import installed_version
from shardmerge.system.terminal_text import one_line, shown

if TYPE_CHECKING:
    import torch

#: The template for a prompt where the tokenizer has no chat template; ``{}`` is the prompt's place.
DEFAULT_TEMPLATE = "### Instruction:\n{}\n\n### Response:\n"

#: generation_config.json may ask for sampling or beams; neither can be compared or streamed.
GREEDY: Mapping[str, Any] = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1}

#: ``{"role": "system" | "user" | "assistant", "content": text}``
Message = dict[str, str]

#: Classes of transformers with a head that does not generate text.
_NO_TEXT = re.compile(r"For(SequenceClassification|TokenClassification|QuestionAnswering)")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
#: Weights in other formats, which are never loaded.
_NOT_LOADED = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
#: In subfolders, files that may be a chat template or a config.
_TEXTS = (".jinja", ".json")
_OFFLINE: Mapping[str, Any] = {"local_files_only": True, "trust_remote_code": False}
#: The oldest versions that `compare` and `chat` are tested with; the extra ``hf`` in pyproject.toml says the same.
OLDEST: Mapping[str, str] = {"transformers": "4.45", "peft": "0.14"}


def library(name: str) -> Any:
    """transformers or PEFT; `ConfigError` where it is not installed, or too old."""
    _check_age(name)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"this needs {name}: pip install transformers peft") from error


def _check_age(name: str) -> None:
    """`ConfigError` for a version that lacks functions used here: its errors would not be the model's fault."""
    oldest, found = OLDEST.get(name), installed_version(name)
    if oldest and found and _numbers(found) < _numbers(oldest):
        raise ConfigError(f"this needs {name} {oldest} or newer, found {found}: pip install --upgrade {name}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def check_directory(path: Path) -> None:
    """`SourceError` or `FormatError` where a directory holds no finished model, or also an adapter."""
    if not path.is_dir():
        raise SourceError(f"{path}: expected a model's directory, found {'a file' if path.exists() else 'nothing'}")
    if any(path.glob("*.gguf")):
        raise FormatError(f"{path}: holds GGUF, which llama.cpp and ollama run; transformers needs safetensors")
    check_files(path)
    for names in (("config.json",), _WEIGHTS):
        if not any((path / name).is_file() for name in names):
            raise FormatError(f"{path}: not a finished model: there is no {' or '.join(names)}")
    if os.path.lexists(path / "adapter_config.json"):
        # transformers would load the adapter's base from another place, without a message.
        raise FormatError(f"{path}: has an adapter_config.json; expected a merged model and no adapter beside it")
    if (kind := _class_of(path)) and _NO_TEXT.search(kind):
        raise FormatError(
            f"{path}: is a {kind}, which writes no text; expected a language model. `shardmerge verify` checks any"
            " merge"
        )


def check_files(path: Path) -> None:
    """`SourceError` where a library that loads the directory would block, read without end or read elsewhere."""
    source = LocalSource(str(path))
    for name in source.names():
        if not name.endswith(("/", *_NOT_LOADED)) and ("/" not in name or name.endswith(_TEXTS)):
            source.stat(name)


def _class_of(path: Path) -> str:
    """The class that a config.json names; empty where there is none."""
    try:
        named = json_text.read_object(path / "config.json")["architectures"][0]
    except (OSError, ValueError, TypeError, LookupError):
        return ""
    return one_line(named) if isinstance(named, str) else ""


def device_named(name: str, what: str) -> torch.device:
    """The device of a name: ``cpu``, ``cuda``, ``cuda:1``, or ``auto`` for the CPU. ``what`` will run there.

    Raises `ConfigError` where the name is not a device's, `PlanError` where there is no such device.
    """
    from shardmerge.system.torch_devices import resolve_device

    if not re.fullmatch(DEVICE, name):
        hint = suggestions.hint(name, DEVICES)
        raise ConfigError(f"the device is {name!r}; expected auto, cpu, cuda or cuda:1" + (f"; {hint}" if hint else ""))
    return resolve_device(name, "the device", what)


def load_tokenizer(path: str) -> Any:
    """The tokenizer in a directory."""
    with _loading(path) as transformers:
        return transformers.AutoTokenizer.from_pretrained(path, **_OFFLINE)


def load_model(path: str, dtype: str = "auto") -> Any:
    """The model in a directory, ready to answer; ``dtype`` is a name such as ``float32``, ``auto`` the stored one."""
    if fault := loading_fault(path):
        raise FormatError(f"{path}: {fault}. `shardmerge verify` checks a merge without loading the model")
    with _loading(path) as transformers:
        key = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
        options = {**_OFFLINE, key: dtype, "use_safetensors": True, "output_loading_info": True}
        model, found = transformers.AutoModelForCausalLM.from_pretrained(path, **options)
    _check_tensors(path, found)
    return model.eval()


def loading_fault(path: str) -> str | None:
    """Why transformers would load other weights than a quantised checkpoint holds, here; None if it does not.

    Seen in transformers 5.23: on a CPU the size of blocks is taken from the shapes, so where the last block of FP8 is
    short all are read wrongly; and modelopt's codes are loaded without their scales.
    """
    from shardmerge.system.torch_devices import has_cuda

    config = json_text.read_object(Path(path) / "config.json")
    if not quantization(config) and not (Path(path) / MODELOPT_SETTINGS).is_file():
        return None
    checkpoint = open_checkpoint(LocalSource(path))
    if checkpoint.quantization.get("quant_method") == "modelopt":
        return "transformers loads codes of modelopt without their scales"
    if checkpoint.quantization.get("quant_method") == MLX_METHOD:
        return "transformers does not know MLX's formats"
    if has_cuda():
        return None
    for name, weight in checkpoint.weights.items():
        if weight.stored_as is None or (block := weight.stored_as.setting("block")) is None:
            continue
        rows, columns = weight.tensor.shape[-2:]
        if block[0] < rows and block[1] < columns and (rows % block[0] or columns % block[1]):
            what = f"{name} {list(weight.tensor.shape)} is not whole blocks of {block[0]} × {block[1]}"
            return f"transformers reads such FP8 weights wrongly on a CPU: {what}"
    return None


def vocabulary_size(path: str) -> int:
    """The vocabulary size in a directory's config.json."""
    with _loading(path) as transformers:
        return int(transformers.AutoConfig.from_pretrained(path, **_OFFLINE).get_text_config().vocab_size)


@contextlib.contextmanager
def _loading(path: str) -> Iterator[Any]:
    transformers = library("transformers")
    try:
        with quiet():
            yield transformers
    except Exception as error:  # transformers has no error class of its own: a bad file may raise any
        raise FormatError(f"{path}: transformers cannot load this model: {reason(error)}") from error


def _check_tensors(path: str, found: Any) -> None:
    """Refuse tensors that transformers would initialise itself, and report those that it ignores.

    transformers warns of both, but `quiet` suppresses that.
    """
    if missing := sorted(found["missing_keys"]):
        raise FormatError(f"{path}: {len(missing)} of the model's tensors are not in its files, such as {missing[0]}")
    if unexpected := sorted(found["unexpected_keys"]):
        text = f"{path}: not part of this model and unused: {count(len(unexpected), 'tensor')}, such as {unexpected[0]}"
        print(one_line(text), file=sys.stderr, flush=True)


def reason(error: Exception) -> str:
    """An error of a library, in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress transformers' warnings and progress bars in the block.

    Its errors are printed, with control characters escaped: their text may be the model's.
    """
    theirs = importlib.import_module("transformers.utils.logging")
    verbosity, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    handlers = [*logging.getLogger("transformers").handlers]
    for handler in handlers:
        handler.addFilter(_escape)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(_escape)
        theirs.set_verbosity(verbosity)
        (theirs.enable_progress_bar if bars else theirs.disable_progress_bar)()


def _escape(record: logging.LogRecord) -> bool:
    record.msg, record.args = shown(record.getMessage()), ()
    return True


def check_template(template: str | None) -> None:
    """`ConfigError` where a template has no place for the prompt, or several."""
    if template is not None and (count := template.count("{}")) != 1:
        raise ConfigError(f"the template {template!r} has {count} places {{}} for the prompt; expected exactly 1")


def template_for(tokenizer: Any, given: str | None) -> str | None:
    """The plain template to use, or None for the tokenizer's chat template.

    ``\\n`` in a given one, typed as two characters, is a newline.
    """
    template = given or (None if tokenizer.chat_template else DEFAULT_TEMPLATE)
    return template and template.replace("\\n", "\n")


def encode(tokenizer: Any, template: str | None, messages: Sequence[Message]) -> dict[str, Any]:
    """``input_ids`` and ``attention_mask``, (1, n) each. A plain template has room for the last message only."""
    if template is not None:
        opening = messages[0]["content"] + "\n\n" if messages[0]["role"] == "system" else ""
        filled = template.replace("{}", messages[-1]["content"])
        encoded = tokenizer(opening + filled, return_tensors="pt")
    else:
        try:
            encoded = tokenizer.apply_chat_template(
                list(messages), tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        except Exception as error:  # a chat template is the model's own program, and may raise any
            raise ConfigError(
                f"the chat template refuses: {reason(error)}; one of your own (template=) goes around it"
            ) from error
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def generate(model: Any, inputs: Mapping[str, Any], max_new_tokens: int, stop: list[int] | None, **options: Any) -> Any:
    """The tokens of prompt and greedy answer, (1, n). ``options`` are passed on to transformers."""
    limits = {"max_new_tokens": max_new_tokens, "eos_token_id": stop}
    try:
        return model.generate(**inputs, **limits, **GREEDY, **options)
    except IndexError as error:  # learned position embeddings end where the context does
        raise ConfigError("prompt and answer are longer than the model's context") from error


def stop_ids(model: Any, tokenizer: Any) -> list[int] | None:
    """The tokens that end an answer, by the model's config and by the tokenizer.

    A tuned model often ends its turn with the tokenizer's token while its config still names the base's.
    """
    known = model.generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])}
    return sorted(ids - {None}) or None
