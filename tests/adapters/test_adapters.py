"""PEFT's LoRA files: which keys make an update, and which settings and keys are refused, by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shardmerge.adapters.claims import ModuleUpdate
from shardmerge.adapters.formats.peft import REFUSED_TYPES
from shardmerge.adapters.methods.base import add_scaled, check_dtypes
from shardmerge.adapters.registry import FAMILIES, FORMATS, detect_format
from shardmerge.spec.tensors import TensorRef
from tests.support.builders import ALPHA, Q0, RANK, V0, content, peft_config, refs_of
from tests.support.claims import claim_peft, shapes

P = "base_model.model."


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("infix", ["", ".default", ".my-adapter_2"])
@pytest.mark.parametrize(
    "prefix",
    [
        P,
        "",
        P + "_orig_mod.",
        "_orig_mod." + P,
        P + "_fsdp_wrapped_module._orig_mod.",
        P + "_checkpoint_wrapped_module.",
    ],
)
def test_key_names_its_module(prefix: str, infix: str) -> None:
    tensors = refs_of(
        {f"{prefix}{Q0}.lora_A{infix}.weight": (RANK, 32), f"{prefix}{Q0}.lora_B{infix}.weight": (16, RANK)}
    )
    claims = claim_peft(tensors)
    a, b = tensors.values()
    assert claims.problems == []
    assert claims.leftovers(tensors) == []
    assert claims.updates == [
        ModuleUpdate(Q0, "weight", "lora", (("A", a), ("B", b)), ALPHA / RANK, RANK),
    ]


def test_wrapper_within_a_name() -> None:
    name = "model.layers.0._orig_mod.self_attn._checkpoint_wrapped_module.q_proj"
    tensors = refs_of({f"{P}{name}.lora_A.weight": (RANK, 32), f"{P}{name}.lora_B.weight": (32, RANK)})
    assert [update.module for update in claim_peft(tensors).updates] == [Q0]


def test_half_is_named_with_what_is_missing() -> None:
    for role, other in ("AB", "BA"):
        for infix in ("", ".default"):
            tensors = refs_of(shapes(Q0, V0, infix=infix))
            del tensors[f"{P}{Q0}.lora_{other}{infix}.weight"]
            claims = claim_peft(tensors)
            there, missing = (f"{P}{Q0}.lora_{one}{infix}.weight" for one in (role, other))
            assert claims.problems == [f"{there} is there without {missing}"]
            assert [update.module for update in claims.updates] == [V0]


def test_halves_of_different_adapters_are_no_pair() -> None:
    tensors = refs_of({f"{P}{Q0}.lora_A.one.weight": (4, 32), f"{P}{Q0}.lora_B.two.weight": (32, 4)})
    claims = claim_peft(tensors)
    assert claims.updates == []
    assert len(claims.problems) == 2


@pytest.mark.parametrize(
    ("a", "b", "parts"),
    [
        ((4, 32), (32, 5), ["disagree on the rank", "[4, 32]", "[32, 5]", "(r, in) and (out, r)"]),
        ((32, 4), (4, 32), ["has rank 32", "adapter_config.json says 4"]),
        ((8, 32), (32, 8), ["has rank 8", "adapter_config.json says 4", Q0]),
        ((4, 32, 3), (32, 4, 2), ["are not factors", "of a convolution (r, in, k…) and (out, r, 1…)"]),
        ((4, 32, 3), (32, 4), ["are not factors"]),
        ((4,), (32, 4), ["are not factors"]),
        ((), (), ["are not factors"]),
    ],
    ids=["ranks differ", "transposed", "not the config's", "kernel in B", "kernel in A", "vector", "scalars"],
)
def test_factors_that_do_not_fit(a: tuple[int, ...], b: tuple[int, ...], parts: list[str]) -> None:
    tensors = refs_of({f"{P}{Q0}.lora_A.weight": a, f"{P}{Q0}.lora_B.weight": b})
    claims = claim_peft(tensors)
    (problem,) = claims.problems
    for part in parts:
        assert part in problem
    assert [update.fits for update in claims.updates] == [False]
    assert claims.leftovers(tensors) == []


@pytest.mark.parametrize(
    ("targets", "covered"),
    [
        (["q_proj"], True),
        ([Q0], True),
        (["self_attn.q_proj"], True),
        (["v_proj"], False),
        (["proj"], False),
        ([], False),
        (None, True),
        ("all-linear", True),
        (r".*\.q_proj", True),
        ("q_proj", False),
    ],
    ids=str,
)
def test_target_modules(targets: object, covered: bool) -> None:
    claims = claim_peft(refs_of(shapes(Q0)), target_modules=targets)
    if covered:
        assert claims.problems == []
    else:
        (problem,) = claims.problems
        assert "target_modules do not cover " + Q0 in problem


# --- settings ---------------------------------------------------------------------------------------------------------

_VALUES: tuple[Any, ...] = (True, 1, "x", False, 0, "", [], {})
UNSUPPORTED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "replication": ({"layer_replication": [[0, 2], [1, 3]]}, ["layer_replication", "replicated layers"]),
    "aLoRA": ({"alora_invocation_tokens": [1]}, ["alora_invocation_tokens", "cannot be merged"]),
    "QALoRA": ({"use_qalora": True}, ["use_qalora", "QALoRA"]),
    "Arrow": ({"arrow_config": {"top_k": 2}}, ["arrow_config", "Arrow", "cannot be merged"]),
    **{
        f"initialisation {name}": ({"init_lora_weights": name}, [f"init_lora_weights: {name!r}", "Convert", "PEFT"])
        for name in ("pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "lora_ga")
    },
    "initialisation loftq": (
        {"init_lora_weights": "loftq"},
        ["'loftq' puts quantised weights", "No conversion undoes"],
    ),
    **{
        f"unknown initialisation {name}": ({"init_lora_weights": name}, [f"init_lora_weights: {name!r}", "is unknown"])
        for name in ("xavier", "PiSSA", "pissa_niter_", "Lora_GA", "LoftQ", "true", 7, 0)
    },
    **{
        f"an unknown key {value!r}": (
            {"use_magic": value},
            ["the key 'use_magic' is unknown", f"found {value!r}", "ignore_keys"],
        )
        for value in _VALUES
    },
    "no rank": ({"r": ...}, ["r must be a whole number above zero, found nothing"]),
    "no alpha": ({"lora_alpha": ...}, ["lora_alpha must be a finite number, found nothing"]),
    **{
        f"r {value!r}"[:20]: ({"r": value}, ["r must be a whole number above zero", f"found {value!r}"])
        for value in (0, -1, 4.0, "4", True, None)
    },
    **{
        f"lora_alpha {value!r}": ({"lora_alpha": value}, ["lora_alpha must be a finite number", f"found {value!r}"])
        for value in (float("nan"), float("inf"), "16", True, None)
    },
    "lora_alpha beyond all floats": ({"lora_alpha": 10**400}, ["lora_alpha must be a finite number"]),
    "r beyond all floats": ({"r": 10**400, "lora_alpha": 0.5}, ["r must be a whole number above zero"]),
    "rank_pattern is a list": ({"rank_pattern": ["q"]}, ["rank_pattern must map module names", "['q']"]),
    "rank_pattern of zero": ({"rank_pattern": {"q": 0}}, ["rank_pattern['q'] must be a whole number", "found 0"]),
    "alpha_pattern is text": ({"alpha_pattern": "q"}, ["alpha_pattern must map module names", "'q'"]),
    "alpha_pattern of nan": ({"alpha_pattern": {"q": float("nan")}}, ["alpha_pattern['q'] must be a finite number"]),
    "alpha_pattern beyond floats": ({"alpha_pattern": {"q": 10**400}}, ["alpha_pattern['q'] must be a finite"]),
    **{
        f"{key} {name}": ({key: {pattern: 4}}, [f"{key}[", "is not a regular expression"])
        for key in ("rank_pattern", "alpha_pattern")
        for name, pattern in {
            "unclosed": "(q",
            "flag in the middle": "(?i)q_proj",
            "too large": "q{99999999999999}",
            "too deep": "(" * 2000 + ")" * 2000,
        }.items()
    },
    "targets unclosed": ({"target_modules": "(q"}, ["target_modules is not a regular expression"]),
    "targets too large": ({"target_modules": "q{99999999999999}"}, ["target_modules is not a regular expression"]),
    "targets too deep": ({"target_modules": "(" * 2000 + ")" * 2000}, ["target_modules is not a regular expression"]),
    "targets are a mapping": ({"target_modules": {}}, ["target_modules must be a string or a list of strings"]),
    "targets hold a number": ({"target_modules": ["q", 1]}, ["target_modules must be a string or a list", "['q', 1]"]),
}


@pytest.mark.parametrize(("changes", "parts"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_setting_is_refused_by_name(changes: dict[str, Any], parts: list[str]) -> None:
    claims = claim_peft(refs_of(shapes(Q0)), **changes)
    assert claims.refused
    assert claims.updates == []
    (problem,) = claims.problems
    for part in parts:
        assert part in problem
    assert len(problem) < 5000


def test_every_wrong_setting_is_told() -> None:
    changes = {"use_qalora": True, "bias": "most", "r": 0, "use_magic": 1, "init_lora_weights": "olora"}
    told = " ".join(claim_peft(refs_of(shapes(Q0)), **changes).problems)
    for part in ("use_qalora", "bias must", "r must be", "use_magic", "olora"):
        assert part in told


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": False, "modules_to_save": None, "layer_replication": [], "target_parameters": None},
        {"rank_pattern": {}, "alpha_pattern": None},
        {"bias": None},
        {"some_future_key": None, "merge_weights": False, "enable_lora": None},
        {"corda_config": {"a": 1}, "eva_config": {"a": 1}, "loftq_config": {"a": 1}, "megatron_core": "x"},
        *(
            {"init_lora_weights": value}
            for value in (True, False, "gaussian", "eva", "orthogonal", "mica", "MiCA", None)
        ),
    ],
    ids=lambda changes: ",".join(changes) + str(changes.get("init_lora_weights", "")),
)
def test_setting_that_does_nothing(changes: dict[str, Any]) -> None:
    claims = claim_peft(refs_of(shapes(Q0)), **changes)
    assert claims.problems == []
    assert [(update.module, update.scaling) for update in claims.updates] == [(Q0, ALPHA / RANK)]


@pytest.mark.parametrize("kind", REFUSED_TYPES)
def test_method_without_a_merge_is_refused_by_name(kind: str) -> None:
    claims = FORMATS["peft"].claim(content(refs_of(shapes(Q0)), peft_config(peft_type=kind)))
    assert claims.problems == [f"peft_type {kind}: {REFUSED_TYPES[kind]}"]
    assert claims.refused


@pytest.mark.parametrize("kind", [None, ..., "LORAX", 7, ["LORA"]], ids=str)
def test_config_without_a_method(kind: object) -> None:
    claims = FORMATS["peft"].claim(content(refs_of(shapes(Q0)), peft_config(peft_type=kind)))
    (problem,) = claims.problems
    assert "this version merges" in problem and "LORA" in problem
    assert claims.refused


# --- PEFT's keys without a config -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "scaling", "expected"),
    [(12.0, None, 12 / RANK), (None, 0.25, 0.25), (0.0, None, 0.0), (None, 0.0, 0.0), (None, -1.0, -1.0)],
    ids=["alpha", "scaling", "alpha 0", "scaling 0", "negative"],
)
def test_bare_factors(alpha: float | None, scaling: float | None, expected: float) -> None:
    claims = FORMATS["peft"].claim(content(refs_of(shapes(Q0)), None, alpha, scaling))
    assert claims.problems == []
    assert [(update.module, update.rank, update.scaling) for update in claims.updates] == [(Q0, RANK, expected)]


def test_bare_factors_need_a_scale() -> None:
    claims = FORMATS["peft"].claim(content(refs_of(shapes(Q0))))
    assert claims.refused
    assert "no adapter_config.json" in claims.problems[0]
    assert "give alpha (or scaling)" in claims.problems[0]


@pytest.mark.parametrize(("a", "b"), [((), ()), ((0, 32), (32, 0)), ((4, 32), (32, 5))], ids=str)
def test_bare_factors_that_do_not_fit(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    tensors = refs_of({f"{Q0}.lora_A.weight": a, f"{Q0}.lora_B.weight": b})
    claims = FORMATS["peft"].claim(content(tensors, None, 8.0))
    assert claims.leftovers(tensors) == []
    assert bool(claims.problems) == (0 not in a)


def test_formats_are_told_apart() -> None:
    peft, pure = refs_of(shapes(Q0)), refs_of({Q0 + ".A": (32, 4), Q0 + ".B": (4, 32)})
    assert detect_format(peft, peft_config()).name == "peft"
    assert detect_format(peft, None).name == "peft"
    assert detect_format(pure, None).name == "pure-pytorch"
    assert detect_format(pure, peft_config()).name == "peft"
    assert detect_format({**pure, **refs_of({"other": (1,)})}, None).name == "peft"
    assert detect_format({}, None).name == "peft"


# --- the family -------------------------------------------------------------------------------------------------------


def lora(a: tuple[int, ...], b: tuple[int, ...], dtype: str = "F32") -> ModuleUpdate:
    refs = refs_of({"the.A": a, "the.B": b}, dtype)
    return ModuleUpdate("module", "weight", "lora", (("A", refs["the.A"]), ("B", refs["the.B"])), 1.0, a[0])


@pytest.mark.parametrize("shape", [(48, 32), (48, 32, 3), (48, 32, 3, 5)], ids=str)
def test_fitting_update(shape: tuple[int, ...]) -> None:
    kernel = shape[2:]
    assert FAMILIES["lora"].check(lora((4, 32, *kernel), (48, 4, *(1 for _ in kernel))), shape) == []


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ((48, 32, 3), ["the update is (48, 32)", "is (48, 32, 3)"]),
        ((32,), ["not a matrix"]),
        ((), ["not a matrix"]),
        ((48, 33), ["the update is (48, 32) from the.A and the.B", "is (48, 33)"]),
        ((32, 48), ["the update is (48, 32)", "is (32, 48)"]),
        ((1, 32), ["the update is (48, 32)", "is (1, 32)"]),
    ],
    ids=["convolution", "vector", "scalar", "in", "transposed", "out"],
)
def test_update_that_does_not_fit_its_weight(shape: tuple[int, ...], parts: list[str]) -> None:
    (problem,) = FAMILIES["lora"].check(lora((4, 32), (48, 4)), shape)
    for part in ("module", *parts):
        assert part in problem


def weight(dtype: str) -> TensorRef:
    return refs_of({"base.weight": (48, 32)}, dtype)["base.weight"]


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("factors", ["F64", "F32", "F16", "BF16"])
def test_dtypes_that_merge(dtype: str, factors: str) -> None:
    assert check_dtypes(lora((4, 32), (48, 4), factors), weight(dtype), FAMILIES["lora"]) == []


@pytest.mark.parametrize("dtype", ["F8_E4M3", "U8", "I32", "F64"])
def test_weights_that_do_not_merge(dtype: str) -> None:
    (problem,) = check_dtypes(lora((4, 32), (48, 4)), weight(dtype), FAMILIES["lora"])
    for part in ("module", "base.weight, [48, 32]", f"stored as {dtype}", "dequantised"):
        assert part in problem


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3", "BOOL", "I64"])
def test_factors_that_are_no_floats(dtype: str) -> None:
    (problem,) = check_dtypes(lora((4, 32), (48, 4), dtype), weight("F32"), FAMILIES["lora"])
    assert dtype in problem
    assert "the.A" in problem


def test_factors_that_are_whole_numbers_on_purpose() -> None:
    update = ModuleUpdate(
        "module", "weight", "shira", (("indices", refs_of({"the.places": (2, 8)}, "I32")["the.places"]),)
    )
    assert check_dtypes(update, weight("F32"), FAMILIES["shira"]) == []
    assert check_dtypes(update, weight("F32"), FAMILIES["lora"]) != []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scaling", [1.0, 2.0, 16.0, 2.0**20, 0.5, 0.25, 0.3, 3.0, -2.0, 0.0])
def test_a_scaled_product_is_rounded_before_it_is_added(scaling: float, dtype: torch.dtype) -> None:
    tile = torch.randn(64, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    product = torch.randn(64, 500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # Of all magnitudes, down to those that are not normal.
    tile, product = (
        (value * 10.0 ** torch.linspace(-44, 6, 500, dtype=torch.float64)).to(dtype) for value in (tile, product)
    )
    expected = tile + product * scaling
    assert not torch.equal(expected, tile) or not scaling
    add_scaled(tile, product, scaling)
    assert torch.equal(tile, expected)
