"""The inputs of `tools.digests`: how bases and adapters are made, from fixed seeds.

Nothing here imports shardmerge or its tests, whose modules may be named otherwise in another checkout. A maker writes
into a folder that exists and is empty. Models are transformers', adapters PEFT's; those of other trainers are written
by hand.
"""

from __future__ import annotations

import json
import struct
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

#: Writes a base into a folder.
MakeBase = Callable[[Path], None]
#: Writes an adapter into its second folder, for the base in its first.
MakeAdapter = Callable[[Path, Path], None]
Tensors = dict[str, Tensor]
#: Edits the tensors of a file in place, given the file's name.
Edit = Callable[[str, Tensors], None]

VOCAB = 96
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SHAPE_WITHOUT_GROUPS = {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"}
_ONE_FILE, _ADAPTER_FILE, _ADAPTER_CONFIG = "model.safetensors", "adapter_model.safetensors", "adapter_config.json"


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def random(shape: Sequence[int], seed: int | str, scale: float = 0.1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers of a seed, which a text may be."""
    number = seed if isinstance(seed, int) else zlib.crc32(seed.encode())
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(number)) * scale).to(dtype)


# --- bases ------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Convolutions, an embedding, a norm and linear layers; no model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, 24)
        self.wide = nn.Linear(24, 56)
        self.narrow = nn.Linear(56, 24)
        self.norm = nn.LayerNorm(24)
        self.conv1 = nn.Conv1d(24, 18, 3, padding=1)
        self.conv2 = nn.Conv2d(2, 6, (3, 5), padding=(1, 2))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.norm(self.narrow(torch.relu(self.wide(self.embed(tokens)))))
        seen = torch.tanh(self.conv1(hidden.transpose(1, 2)))
        return torch.as_tensor(self.conv2(seen.view(len(seen), 2, 9, -1)))


def _transformers() -> Any:
    """The library, quiet. It is imported where it is needed, as it takes seconds."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def model(
    kind: str,
    config: str = "",
    *,
    dtype: str = "float32",
    shard: int | str = 10**9,
    in_memory: bool = False,
    tokenizer: bool = False,
    edit: Edit | None = None,
    **settings: Any,
) -> MakeBase:
    """A model that transformers makes and saves; ``in_memory``, with tensors as its modules have them."""

    def make(folder: Path) -> None:
        library = _transformers()
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(11)
            of = getattr(library, config or kind.replace("ForCausalLM", "Config"))
            made = getattr(library, kind)(of(**{**SHAPE, **settings}))
            for parameter in made.parameters():  # norms of ones and biases of zeros would hide what is done to them
                parameter += 0.1 * torch.randn_like(parameter)
        made.to(getattr(torch, dtype)).save_pretrained(folder, save_original_format=not in_memory, max_shard_size=shard)
        if edit is not None:
            _edit_files(folder, edit)
        if tokenizer:
            _write_tokenizer(folder, settings.get("vocab_size", VOCAB))

    return make


def net(dtype: str = "float32") -> MakeBase:
    """`Net` in one file."""

    def make(folder: Path) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(11)
            state = Net().to(getattr(torch, dtype)).state_dict()
        save_file(state, folder / _ONE_FILE, metadata={"format": "pt"})
        write_json(folder / "config.json", {"tie_word_embeddings": False})

    return make


def raw(
    shapes: Mapping[str, Sequence[int]],
    dtype: torch.dtype = torch.float32,
    *,
    shards: int = 1,
    pickled: bool = False,
    edit: Edit | None = None,
    **config: Any,
) -> MakeBase:
    """Tensors of these shapes, in files of about as many; ``pickled``, as ``pytorch_model.bin``."""

    def make(folder: Path) -> None:
        tensors = {name: random(shape, name, dtype=dtype) for name, shape in shapes.items()}
        if edit is not None:
            edit(_ONE_FILE, tensors)
        if pickled:
            torch.save(tensors, folder / "pytorch_model.bin")
        else:
            _write_shards(folder, tensors, shards)
        write_json(folder / "config.json", {"tie_word_embeddings": False, **config})
        write_json(folder / "generation_config.json", {"eos_token_id": 2})
        (folder / "README.md").write_text("# small\n", encoding="utf-8")

    return make


def decoder_shapes(hidden: int, intermediate: int, vocab: int = VOCAB, layers: int = 1) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama whose heads all have keys and values of their own."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for number in range(layers):
        layer = f"model.layers.{number}"
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (intermediate, hidden) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, intermediate)
        shapes |= {f"{layer}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return {**shapes, "model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def _write_shards(folder: Path, tensors: Tensors, count: int) -> None:
    if count == 1:
        save_file(tensors, folder / _ONE_FILE, metadata={"format": "pt"})
        return
    placed: dict[str, str] = {}
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = dict(list(tensors.items())[number::count])
        save_file(part, folder / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / f"{_ONE_FILE}.index.json", {"metadata": {"total_size": total}, "weight_map": placed})


def _edit_files(folder: Path, edit: Edit) -> None:
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        edit(file.name, tensors)
        save_file(tensors, file, metadata={"format": "pt"})


def _write_tokenizer(folder: Path, vocab: int) -> None:
    """SentencePiece's ``tokenizer.model``: special pieces, a few bytes, and words with falling scores.

    A ModelProto is a list of fields 1, each a piece: 1 its text, 2 its score (float), 3 its type (NORMAL is 1).
    """
    special = [("<unk>", 2), ("<s>", 3), ("</s>", 3)]
    pieces = [*special, *((f"<0x{byte:02X}>", 6) for byte in range(16))]
    pieces += [(f"\N{LOWER ONE EIGHTH BLOCK}w{number}", 1) for number in range(vocab - len(pieces))]
    content = b""
    for number, (text, kind) in enumerate(pieces):
        piece = text.encode()
        message = b"\x0a" + bytes([len(piece)]) + piece + b"\x15" + struct.pack("<f", -float(number))
        message += b"\x18" + bytes([kind])
        content += b"\x0a" + bytes([len(message)]) + message
    (folder / "tokenizer.model").write_bytes(content)
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(folder / "tokenizer_config.json", {**settings, "add_bos_token": True, "add_prefix_space": True})


# --- adapters ---------------------------------------------------------------------------------------------------------


def peft(
    config: str,
    *targets: str,
    scale: float = 0.1,
    dtype: str = "float32",
    pickled: bool = False,
    more_tokens: int = 0,
    **settings: Any,
) -> MakeAdapter:
    """An adapter of random numbers that PEFT makes on the base and saves; ``config`` is the name of its class."""

    def make(base: Path, folder: Path) -> None:
        import peft as library

        if targets:
            settings["target_modules"] = targets[0] if targets == ("all-linear",) else list(targets)
        with torch.random.fork_rng(), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # PEFT warns of what it does about embeddings and tied weights
            torch.manual_seed(12)
            before = _loaded(base)
            if more_tokens:
                before.resize_token_embeddings(VOCAB + more_tokens, mean_resizing=False)
            made = library.get_peft_model(before, getattr(library, config)(**settings))
            for parameter in made.parameters():
                if parameter.requires_grad:  # many are zero or one to begin with
                    parameter += scale * torch.randn_like(parameter)
            made.save_pretrained(folder)
        _tidy(folder, getattr(torch, dtype), pickled, settings)

    return make


def _loaded(base: Path) -> Any:
    """The base as a module: transformers' class that its config.json names, or `Net`."""
    kinds = json.loads((base / "config.json").read_text(encoding="utf-8")).get("architectures")
    if kinds:
        return getattr(_transformers(), kinds[0]).from_pretrained(base, dtype="auto")
    made = Net()
    made.load_state_dict(load_file(base / _ONE_FILE))
    return made


def _tidy(folder: Path, dtype: torch.dtype, pickled: bool, settings: Mapping[str, Any]) -> None:
    """Store the numbers in ``dtype``; lists that PEFT writes from sets, sorted or as they were in ``settings``."""
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / _ADAPTER_CONFIG).read_text(encoding="utf-8"))
    for key, value in config.items():
        if key in ("target_modules", "modules_to_save", "feedforward_modules") and isinstance(value, list):
            config[key] = sorted(value)
    if "target_parameters" in settings:
        config["target_parameters"] = settings["target_parameters"]
    write_json(folder / _ADAPTER_CONFIG, {**config, "base_model_name_or_path": None})
    file = folder / _ADAPTER_FILE
    tensors = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in sorted(load_file(file).items())
    }
    if pickled:
        file.unlink()
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, file, metadata={"format": "pt"})


def by_hand(modules: Mapping[str, tuple[int, int]], rank: int = 5, **config: Any) -> MakeAdapter:
    """PEFT's LoRA on modules of (out, in), without PEFT."""

    def make(base: Path, folder: Path) -> None:
        tensors: Tensors = {}
        for module, (rows, columns) in modules.items():
            tensors[f"base_model.model.{module}.lora_A.weight"] = random((rank, columns), f"{module}.A")
            tensors[f"base_model.model.{module}.lora_B.weight"] = random((rows, rank), f"{module}.B")
        save_file(tensors, folder / _ADAPTER_FILE, metadata={"format": "pt"})
        named = sorted({module.rpartition(".")[2] for module in modules})
        settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 13, "target_modules": named, "bias": "none"}
        write_json(folder / _ADAPTER_CONFIG, {**settings, **config})

    return make


def mlx(modules: Mapping[str, tuple[int, int]], rank: int = 5, dora: bool = False) -> MakeAdapter:
    """``adapters.safetensors`` of mlx-lm: A (in, r), B (r, out), and with DoRA the length m (out)."""

    def make(base: Path, folder: Path) -> None:
        tensors: Tensors = {}
        for module, (rows, columns) in modules.items():
            tensors[f"{module}.lora_a"] = random((columns, rank), f"{module}.A")
            tensors[f"{module}.lora_b"] = random((rank, rows), f"{module}.B")
            if dora:
                tensors[f"{module}.m"] = random((rows,), f"{module}.m").abs() + 0.5
        save_file(tensors, folder / "adapters.safetensors")
        lora = {"rank": rank, "scale": 2.6, "dropout": 0.0}
        write_json(folder / _ADAPTER_CONFIG, {"fine_tune_type": "dora" if dora else "lora", "lora_parameters": lora})

    return make


def pure(modules: Mapping[str, tuple[int, int]], rank: int = 5) -> MakeAdapter:
    """``adapter.pt`` of a training loop: A (in, r), B (r, out)."""

    def make(base: Path, folder: Path) -> None:
        tensors: Tensors = {}
        for module, (rows, columns) in modules.items():
            tensors[f"{module}.A"] = random((columns, rank), f"{module}.A")
            tensors[f"{module}.B"] = random((rank, rows), f"{module}.B")
        torch.save(tensors, folder / "adapter.pt")

    return make


def kohya(shapes: Mapping[str, Sequence[int]], rank: int = 4) -> MakeAdapter:
    """Kohya's LoRA on weights of these shapes, matrices and convolutions, with an alpha each."""

    def make(base: Path, folder: Path) -> None:
        tensors: Tensors = {}
        for number, (name, shape) in enumerate(shapes.items()):
            key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            tensors[f"{key}.lora_down.weight"] = random((rank, *shape[1:]), f"{key}.down", 0.3)
            tensors[f"{key}.lora_up.weight"] = random((shape[0], rank, *(1 for _ in shape[2:])), f"{key}.up", 0.3)
            tensors[f"{key}.alpha"] = torch.tensor(2.0 + number)
        save_file(tensors, folder / "lora.safetensors")

    return make
