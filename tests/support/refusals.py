"""Merges that must be refused: how each is set up, and what must be said of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import shardmerge
from shardmerge.errors import FormatError, PlanError, ShardmergeError
from tests.support.builders import (
    DOWN1,
    Q0,
    RANK,
    V0,
    Place,
    llama_tensors,
    model_config,
    peft_config,
    peft_tensors,
    pure_tensors,
    snapshot,
    write_base,
    write_json,
    write_peft,
    write_pure,
)

P = "base_model.model."


@dataclass(frozen=True)
class Refusal:
    """``setup`` changes a place that is in order and returns the config; ``parts`` must be in the message."""

    setup: Callable[[Place], dict[str, Any]]
    parts: Sequence[str]
    error: type[ShardmergeError] = PlanError


def adapter(tensors: Mapping[str, Tensor] | None = None, **config: Any) -> Callable[[Place], dict[str, Any]]:
    """The adapter has these tensors, and these changes in its config."""

    def setup(place: Place) -> dict[str, Any]:
        write_peft(place.adapter, None if tensors is None else dict(tensors), config=peft_config(**config))
        return place.config()

    return setup


def more(tensors: Mapping[str, Tensor]) -> Callable[[Place], dict[str, Any]]:
    """The adapter has these tensors as well."""
    return adapter({**peft_tensors(), **tensors}, target_modules=None)


def factors(
    module: str, out: int, into: int, rank: int = RANK, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    return {
        f"{P}{module}.lora_A.weight": torch.ones(rank, into).to(dtype),
        f"{P}{module}.lora_B.weight": torch.ones(out, rank).to(dtype),
    }


def without(name: str) -> Callable[[Place], dict[str, Any]]:
    return adapter({key: tensor for key, tensor in peft_tensors().items() if key != name})


def base(
    tensors: Mapping[str, Tensor] | None = None,
    *,
    then: Callable[[Place], dict[str, Any]] = Place.config,
    path: str = "",
    **config: Any,
) -> Callable[[Place], dict[str, Any]]:
    """The base is one file of these tensors, and has these changes in its config."""

    def setup(place: Place) -> dict[str, Any]:
        for file in place.base.glob("*.safetensors*"):
            file.unlink()
        write_base(place.base, dict(tensors or llama_tensors()), shards=1, config=model_config(**config))
        return then(place) | ({"base": str(place.base / path)} if path else {})

    return setup


def pure(tensors: Mapping[str, Tensor], **entry: Any) -> Callable[[Place], dict[str, Any]]:
    def setup(place: Place) -> dict[str, Any]:
        path = write_pure(place.folder / "adapter.pt", tensors)
        return place.config(adapters=[{"path": str(path), **entry}])

    return setup


def config(**changes: Any) -> Callable[[Place], dict[str, Any]]:
    return lambda place: place.config(**changes)


def entry(**changes: Any) -> Callable[[Place], dict[str, Any]]:
    """The adapter's entry in the config says more than its path."""
    return lambda place: place.config(adapters=[{"path": str(place.adapter), **changes}])


def stored(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The base's tensors with another one in place of ``name``."""
    return {**llama_tensors(), name: tensor}


def both_missing(place: Place) -> dict[str, Any]:
    return place.config(base=str(place.folder / "no-base"), adapters=[str(place.folder / "no-adapter")])


def two_bases(place: Place) -> dict[str, Any]:
    for name in ("one", "two"):
        write_peft(place.folder / name, config=peft_config(base_model_name_or_path=f"org/{name}"))
    return place.config(base="auto", adapters=[str(place.folder / "one"), str(place.folder / "two")])


def bare_factors(place: Place) -> dict[str, Any]:
    (place.adapter / "adapter_config.json").unlink()
    return place.config()


def overwritten(name: str, text: str) -> Callable[[Place], dict[str, Any]]:
    def setup(place: Place) -> dict[str, Any]:
        (place.folder / name).write_text(text)
        return place.config()

    return setup


def everything(place: Place) -> dict[str, Any]:
    """One problem of every room that looks for them."""
    write_peft(
        place.adapter,
        {**peft_tensors((Q0,)), **factors(V0, 7, 32), "strange": torch.ones(1), **factors("model.ghost", 3, 3)},
        config=peft_config(target_modules=None),
    )
    other = write_pure(place.folder / "other.pt", pure_tensors((DOWN1,)))
    write_json(place.output.with_name("in-the-way"), {})
    return place.config(adapters=[str(place.adapter), str(other)], output={"path": str(place.folder / "in-the-way")})


Q0_WEIGHT = Q0 + ".weight"
LM_HEAD = factors("lm_head", 64, 32)
F8 = llama_tensors()[Q0_WEIGHT].to(torch.float8_e4m3fn)

REFUSALS: dict[str, Refusal] = {
    # --- every tensor of the adapter is accounted for
    "leftover": Refusal(
        more({f"{P}{Q0}.lora_C.weight": torch.ones(2)}), [f"{P}{Q0}.lora_C.weight belongs to no update", "nearest: "]
    ),
    "leftover with its nearest": Refusal(
        more({f"{P}{Q0}.weight": torch.ones(2)}), [f"{P}{Q0}.weight belongs to no update (nearest: {Q0_WEIGHT}"]
    ),
    "leftover DoRA": Refusal(more({f"{P}{Q0}.lora_magnitude_vector.weight": torch.ones(2)}), ["does not say use_dora"]),
    "leftover embedding": Refusal(
        more({f"{P}model.embed_tokens.lora_embedding_A": torch.ones(2)}), ["lora_embedding_A is there without"]
    ),
    "leftover bias": Refusal(more({f"{P}{Q0}.lora_B.bias": torch.ones(32)}), ["does not say lora_bias"]),
    "leftover saved module": Refusal(
        more({f"{P}lm_head.modules_to_save.weight": torch.ones(2)}),
        ["lm_head.modules_to_save.weight is [2]", "[64, 32]"],
    ),
    "prefix is wrong": Refusal(
        adapter(factors("decoder.layers.0.self_attn.q_proj", 32, 32)),
        [
            f"{P}decoder.layers.0.self_attn.q_proj.lora_A.weight updates decoder.layers.0",
            f"not in the base (nearest: {Q0_WEIGHT}",
        ],
    ),
    "no such layer": Refusal(
        adapter(factors("model.layers.9.self_attn.q_proj", 32, 32)), ["model.layers.9.self_attn.q_proj.weight", "near"]
    ),
    "A without B": Refusal(
        without(f"{P}{V0}.lora_B.weight"), [f"{P}{V0}.lora_A.weight is there without {P}{V0}.lora_B.weight"]
    ),
    "B without A": Refusal(
        without(f"{P}{V0}.lora_A.weight"), [f"{P}{V0}.lora_B.weight is there without {P}{V0}.lora_A.weight"]
    ),
    "nothing to merge": Refusal(
        adapter({"strange": torch.ones(1)}), ["strange belongs to no update", "holds nothing that could be merged"]
    ),
    # --- shapes
    "ranks differ": Refusal(
        more({f"{P}{Q0}.lora_B.weight": torch.ones(32, 3)}), ["disagree on the rank", "[4, 32]", "[32, 3]"]
    ),
    "rank is not the config's": Refusal(
        adapter(r=8), [f"{P}{Q0}.lora_A.weight has rank 4", "adapter_config.json says 8"]
    ),
    "shape is not the weight's": Refusal(
        more(factors(V0, 32, 32)), [V0, "the update is (32, 32)", f"{V0}.weight is (16, 32)"]
    ),
    "shape is the transpose": Refusal(more(factors(V0, 32, 16)), ["the update is (32, 16)", "is (16, 32)"]),
    "target is a vector": Refusal(more(factors("model.norm", 32, 1)), ["model.norm.weight, [32] is not a matrix"]),
    "target is a scalar": Refusal(
        base(stored("s.weight", torch.ones(())), then=more(factors("s", 1, 1))), ["s.weight, [] is not a matrix"]
    ),
    "target is a convolution": Refusal(
        base(stored("c.weight", torch.ones(8, 4, 3)), then=more(factors("c", 8, 4))),
        ["c: the update is (8, 4)", "c.weight is (8, 4, 3)"],
    ),
    "factors are empty": Refusal(
        more({f"{P}{Q0}.lora_A.weight": torch.ones(0), f"{P}{Q0}.lora_B.weight": torch.ones(0)}),
        [f"{P}{Q0}.lora_A.weight is empty, [0]", "ZeRO-3", "save it again"],
    ),
    # --- duplicates
    "with and without infix": Refusal(
        more(peft_tensors((Q0,), infix=".default")), [f"both update {Q0_WEIGHT}", ".lora_A.default.weight", "once"]
    ),
    "two infixes": Refusal(
        adapter({**peft_tensors((Q0,), infix=".a"), **peft_tensors((Q0,), infix=".b")}), [f"both update {Q0_WEIGHT}"]
    ),
    "with and without wrapper": Refusal(more(factors(f"_orig_mod.{Q0}", 32, 32)), [f"both update {Q0_WEIGHT}"]),
    # --- numbers
    "alpha is nan": Refusal(adapter(lora_alpha=float("nan")), ["lora_alpha must be a finite number, found nan"]),
    "alpha is infinite": Refusal(adapter(lora_alpha=float("inf")), ["lora_alpha must be a finite number, found inf"]),
    "alpha pattern is infinite": Refusal(
        adapter(alpha_pattern={"q_proj": float("-inf")}),
        ["alpha_pattern['q_proj'] must be a finite number, found -inf"],
    ),
    "scaling times weight overflows": Refusal(
        lambda place: adapter(lora_alpha=1e308)(place) | entry(weight=1e10)(place), [Q0, "scaling", "1e+10"]
    ),
    # --- what cannot be merged
    "prompt tuning": Refusal(adapter(peft_type="PROMPT_TUNING"), ["peft_type PROMPT_TUNING", "nothing to merge"]),
    "unknown family": Refusal(adapter(peft_type="LORAX"), ["'LORAX' is unknown (did you mean LORA?)"]),
    "DoRA without lengths": Refusal(
        adapter(use_dora=True), ["says use_dora", f"{P}{Q0}.lora_magnitude_vector is missing"]
    ),
    "weight of what does not add": Refusal(
        lambda place: more({f"{P}lm_head.weight": torch.ones(64, 32)})(place) | entry(weight=0.5)(place),
        ["weight 0.5 has no meaning for replacement"],
    ),
    "PiSSA": Refusal(
        adapter(init_lora_weights="pissa"), ["init_lora_weights: 'pissa'", "Convert the adapter with PEFT"]
    ),
    "bias": Refusal(adapter(bias="most"), ["bias must be none, all or …_only, found 'most'"]),
    "unknown key": Refusal(adapter(use_magic=True), ["'use_magic' is unknown to this version"]),
    "outside target_modules": Refusal(
        adapter(target_modules=["q_proj", "v_proj"]), [f"target_modules do not cover {DOWN1}", "PEFT would ignore"]
    ),
    "FP8 target": Refusal(base(stored(Q0_WEIGHT, F8)), [f"{Q0_WEIGHT}, [32, 32] is stored as F8_E4M3", "dequantised"]),
    "int8 target": Refusal(base(stored(Q0_WEIGHT, F8.to(torch.int8))), ["is stored as I8", "dequantised"]),
    "float64 target": Refusal(base(stored(Q0_WEIGHT, F8.to(torch.float64))), ["is stored as F64"]),
    "int8 factors": Refusal(
        adapter({name: tensor.to(torch.int8) for name, tensor in peft_tensors().items()}),
        [f"{P}{Q0}.lora_A.weight is stored as I8"],
    ),
    "head that cannot be untied": Refusal(
        base(llama_tensors(tied=True), tie_word_embeddings=True, then=more(factors("lm_head", 63, 32))),
        ["lm_head: the update is (63, 32)"],
    ),
    "head that is neither tied nor stored": Refusal(
        base(llama_tensors(tied=True), then=adapter(LM_HEAD, target_modules=None)), ["lm_head.weight, which is not in"]
    ),
    # --- adapters that carry no scale, or carry one
    "no scale": Refusal(pure(pure_tensors()), ["its scale is unknown: give alpha (or scaling)"]),
    "no adapter_config.json": Refusal(bare_factors, ["no adapter_config.json", "give alpha (or scaling)"]),
    "alpha twice": Refusal(entry(alpha=8), ["it has its own adapter_config.json", "must not be given"]),
    "format is not what it is": Refusal(
        entry(format="pure-pytorch", alpha=8), ["belongs to no update", "holds nothing that could be merged"]
    ),
    "pure: PEFT's layout": Refusal(
        pure({V0 + ".A": torch.ones(4, 32), V0 + ".B": torch.ones(16, 4)}, alpha=8), ["PEFT's layout: transpose both"]
    ),
    "pure: half": Refusal(pure({V0 + ".A": torch.ones(32, 4)}, alpha=8), [f"{V0}.A is there without {V0}.B"]),
    "pure: copy of another base": Refusal(
        pure({**pure_tensors(), V0 + ".original.weight": torch.ones(17, 32)}, alpha=8),
        [f"{V0}.original.weight: a frozen copy of {V0}.weight", "trained on another base"],
    ),
    # --- the base
    "auto, and nothing named": Refusal(config(base="auto"), ["no adapter says what it was trained on"]),
    "auto, and two named": Refusal(two_bases, ["name different bases", "org/one", "org/two"]),
    # --- other classes of error
    "no base": Refusal(config(base="/no/such/base"), ["base /no/such/base: no such file"]),
    "no adapter": Refusal(config(adapters=["/no/such/lora"]), ["adapter /no/such/lora: no such file"]),
    "base is cut": Refusal(
        overwritten("base/model-00001-of-00002.safetensors", "x"), ["model-00001-of-00002", "too short"], FormatError
    ),
    "adapter is cut": Refusal(
        overwritten("adapter/adapter_model.safetensors", "x"), ["adapter_model.safetensors", "too short"], FormatError
    ),
    "neither base nor adapter": Refusal(both_missing, ["2 problems", "no-adapter: no such file", "no-base: no such"]),
    "everything at once": Refusal(
        everything,
        [
            "5 problems",
            f"{V0}: the update is (7, 32)",
            "strange belongs",
            "model.ghost.weight",
            "give alpha",
            "is a file",
        ],
    ),
}

EXIT_CODES = {"PlanError": 3, "FormatError": 4, "SourceError": 5}


def refused(folder: Path, config: dict[str, Any], refusal: Refusal, **how: Any) -> str:
    """The message of the refusal, which must come from `plan` and from `merge`, and leave the disk as it was."""
    before = snapshot(folder)
    for act in (shardmerge.plan, shardmerge.merge):
        with pytest.raises(refusal.error) as raised:
            act(config, **how)
        assert snapshot(folder) == before
        assert type(raised.value) is refusal.error
        assert raised.value.exit_code == EXIT_CODES[refusal.error.__name__]
        message = str(raised.value)
        message.encode()
        assert refusal.error is not PlanError or "nothing was written" in message
        for part in refusal.parts:
            assert part in message, message
    return message
