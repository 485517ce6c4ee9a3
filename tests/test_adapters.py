"""PEFT's LoRA files: which keys make an update, and which settings and keys are refused, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from shardmerge.adapters import FAMILIES, Claims, ModuleUpdate, claim, detect_format, leftover_kind
from shardmerge.spec import TensorRef
from tests.builders import ALPHA, Q0, RANK, V0, peft_config, peft_tensors, refs_of

P = "base_model.model."


def shapes(*modules: str, infix: str = "", rank: int = RANK) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in peft_tensors(modules, rank, infix=infix).items()}


def claim_peft(tensors: Mapping[str, TensorRef], **changes: Any) -> Claims:
    return claim("peft", tensors, peft_config(**changes), None, None)


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
        ((4, 32, 3), (32, 4, 1), ["no matrices", "convolution", "not supported yet"]),
        ((4,), (32, 4), ["no matrices"]),
        ((), (), ["no matrices"]),
    ],
    ids=["ranks differ", "transposed", "not the config's", "convolution", "vector", "scalars"],
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


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (P + "model.embed_tokens.lora_embedding_A", "LoRA on an embedding"),
        (Q0 + ".lora_magnitude_vector.weight", "DoRA"),
        (Q0 + ".lora_B.bias", "a bias of lora_B"),
        (Q0 + ".lora_B.default.bias", "a bias of lora_B"),
        ("model.embed_tokens.token_adapter.trainable_tokens_delta", "trained token embeddings"),
        ("lm_head.modules_to_save.weight", "a module that was trained whole"),
        (Q0 + ".base_layer.weight", "a replaced base layer"),
        ("something.else", ""),
        (Q0 + ".lora_A.weight", ""),
    ],
)
def test_leftover_kind(name: str, kind: str) -> None:
    assert leftover_kind(name).startswith(kind)
    assert bool(leftover_kind(name)) == bool(kind)


# --- settings ---------------------------------------------------------------------------------------------------------

UNSUPPORTED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "DoRA": ({"use_dora": True}, ["use_dora", "DoRA", "not supported yet"]),
    "lora_bias": ({"lora_bias": True}, ["lora_bias", "biases of lora_B", "not supported yet"]),
    "bias all": ({"bias": "all"}, ["bias: 'all'", "trained biases"]),
    "bias lora_only": ({"bias": "lora_only"}, ["bias: 'lora_only'", "trained biases"]),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, ["modules_to_save", "trained whole", "not supported yet"]),
    "tokens": ({"trainable_token_indices": [1]}, ["trainable_token_indices", "token embeddings"]),
    "tokens by module": ({"trainable_token_indices": {"embed_tokens": [1]}}, ["trainable_token_indices"]),
    "parameters": ({"target_parameters": ["experts.down_proj"]}, ["target_parameters", "fused experts"]),
    "replication": ({"layer_replication": [[0, 2], [1, 3]]}, ["layer_replication", "replicated layers"]),
    "aLoRA": ({"alora_invocation_tokens": [1]}, ["alora_invocation_tokens", "cannot be merged"]),
    "QALoRA": ({"use_qalora": True}, ["use_qalora", "QALoRA"]),
    "BdLoRA": ({"use_bdlora": True}, ["use_bdlora", "block-diagonal"]),
    "Arrow": ({"arrow_config": {"top_k": 2}}, ["arrow_config", "Arrow", "cannot be merged"]),
    "KaSA": ({"kasa_config": {"beta": 1}}, ["kasa_config", "KaSA"]),
    "MonteCLoRA": ({"monteclora_config": {"n": 1}}, ["monteclora_config", "MonteCLoRA"]),
    **{
        f"initialisation {name}": ({"init_lora_weights": name}, [f"init_lora_weights: {name!r}", "Convert", "PEFT"])
        for name in ("pissa", "pissa_niter_16", "olora", "corda", "lora_ga", "PiSSA", 7)
    },
    "an unknown key": ({"use_magic": True}, ["the key 'use_magic' is unknown", "remove it from the file"]),
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
        f"{key} {name}": ({key: {pattern: 4}}, [f"{key}[", "is no regular expression"])
        for key in ("rank_pattern", "alpha_pattern")
        for name, pattern in {
            "unclosed": "(q",
            "flag in the middle": "(?i)q_proj",
            "too large": "q{99999999999999}",
            "too deep": "(" * 2000 + ")" * 2000,
        }.items()
    },
    "targets unclosed": ({"target_modules": "(q"}, ["target_modules is no regular expression"]),
    "targets too large": ({"target_modules": "q{99999999999999}"}, ["target_modules is no regular expression"]),
    "targets too deep": ({"target_modules": "(" * 2000 + ")" * 2000}, ["target_modules is no regular expression"]),
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
    changes = {"use_dora": True, "lora_bias": True, "bias": "all", "r": 0, "use_magic": 1, "init_lora_weights": "olora"}
    told = " ".join(claim_peft(refs_of(shapes(Q0)), **changes).problems)
    for part in ("use_dora", "lora_bias", "bias: 'all'", "r must be", "use_magic", "olora"):
        assert part in told


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": False, "modules_to_save": None, "layer_replication": [], "target_parameters": None},
        {"rank_pattern": {}, "alpha_pattern": None},
        {"bias": None},
        {"some_future_key": None, "another": False, "third": {}, "fourth": 0},
        {"corda_config": {"a": 1}, "eva_config": {"a": 1}, "loftq_config": {"a": 1}, "megatron_core": "x"},
        *({"init_lora_weights": value} for value in (True, False, "gaussian", "eva", "orthogonal", "loftq", None)),
    ],
    ids=lambda changes: ",".join(changes) + str(changes.get("init_lora_weights", "")),
)
def test_setting_that_does_nothing(changes: dict[str, Any]) -> None:
    claims = claim_peft(refs_of(shapes(Q0)), **changes)
    assert claims.problems == []
    assert [(update.module, update.scaling) for update in claims.updates] == [(Q0, ALPHA / RANK)]


@pytest.mark.parametrize(
    "kind", ["IA3", "LOHA", "LOKR", "ADALORA", "VERA", "OFT", "BOFT", "PROMPT_TUNING", "PREFIX_TUNING", "XLORA", "POLY"]
)
def test_other_family_is_refused_by_name(kind: str) -> None:
    claims = claim("peft", refs_of(shapes(Q0)), peft_config(peft_type=kind), None, None)
    assert claims.problems == [f"{kind} adapters are not supported yet; this version merges LORA"]
    assert claims.refused


@pytest.mark.parametrize("kind", [None, ...], ids=["null", "missing"])
def test_config_without_a_family(kind: object) -> None:
    claims = claim("peft", refs_of(shapes(Q0)), peft_config(peft_type=kind), None, None)
    assert claims.problems == ["adapter_config.json names no peft_type; this version merges LORA"]


# --- PEFT's keys without a config -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "scaling", "expected"),
    [(12.0, None, 12 / RANK), (None, 0.25, 0.25), (0.0, None, 0.0), (None, 0.0, 0.0), (None, -1.0, -1.0)],
    ids=["alpha", "scaling", "alpha 0", "scaling 0", "negative"],
)
def test_bare_factors(alpha: float | None, scaling: float | None, expected: float) -> None:
    claims = claim("peft", refs_of(shapes(Q0)), None, alpha, scaling)
    assert claims.problems == []
    assert [(update.module, update.rank, update.scaling) for update in claims.updates] == [(Q0, RANK, expected)]


def test_bare_factors_need_a_scale() -> None:
    claims = claim("peft", refs_of(shapes(Q0)), None, None, None)
    assert claims.refused
    assert "no adapter_config.json" in claims.problems[0]
    assert "give alpha (or scaling)" in claims.problems[0]


@pytest.mark.parametrize(("a", "b"), [((), ()), ((0, 32), (32, 0)), ((4, 32), (32, 5))], ids=str)
def test_bare_factors_that_do_not_fit(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    tensors = refs_of({f"{Q0}.lora_A.weight": a, f"{Q0}.lora_B.weight": b})
    claims = claim("peft", tensors, None, 8.0, None)
    assert claims.leftovers(tensors) == []
    assert bool(claims.problems) == (0 not in a)


def test_formats_are_told_apart() -> None:
    peft, pure = refs_of(shapes(Q0)), refs_of({Q0 + ".A": (32, 4), Q0 + ".B": (4, 32)})
    assert detect_format(peft, peft_config()) == "peft"
    assert detect_format(peft, None) == "peft"
    assert detect_format(pure, None) == "pure-pytorch"
    assert detect_format(pure, peft_config()) == "peft"
    assert detect_format({**pure, **refs_of({"other": (1,)})}, None) == "peft"
    assert detect_format({}, None) == "peft"


# --- the family -------------------------------------------------------------------------------------------------------


def lora(a: tuple[int, ...], b: tuple[int, ...], dtype: str = "F32") -> ModuleUpdate:
    refs = refs_of({"the.A": a, "the.B": b}, dtype)
    return ModuleUpdate("module", "weight", "lora", (("A", refs["the.A"]), ("B", refs["the.B"])), 1.0, a[0])


def check(update: ModuleUpdate, shape: tuple[int, ...], dtype: str) -> list[str]:
    return FAMILIES[update.family].check(update, refs_of({"base.weight": shape}, dtype)["base.weight"])


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("factors", ["F64", "F32", "F16", "BF16"])
def test_fitting_update(dtype: str, factors: str) -> None:
    assert check(lora((4, 32), (48, 4), factors), (48, 32), dtype) == []


@pytest.mark.parametrize(
    ("shape", "dtype", "parts"),
    [
        ((48, 32), "F8_E4M3", ["stored as F8_E4M3", "dequantised", "base.weight, [48, 32]"]),
        ((48, 32), "U8", ["stored as U8"]),
        ((48, 32), "I32", ["stored as I32"]),
        ((48, 32), "F64", ["stored as F64"]),
        ((48, 32, 1), "F32", ["no matrix", "[48, 32, 1]", "only Linear"]),
        ((32,), "F32", ["no matrix"]),
        ((), "F32", ["no matrix"]),
        ((48, 33), "F32", ["the update is (48, 32) from the.A and the.B", "is (48, 33)"]),
        ((32, 48), "F32", ["the update is (48, 32)", "is (32, 48)"]),
        ((1, 32), "F32", ["the update is (48, 32)", "is (1, 32)"]),
    ],
    ids=["fp8", "u8", "i32", "f64", "convolution", "vector", "scalar", "in", "transposed", "out"],
)
def test_update_that_does_not_fit_its_weight(shape: tuple[int, ...], dtype: str, parts: list[str]) -> None:
    (problem,) = check(lora((4, 32), (48, 4)), shape, dtype)
    for part in ("module", *parts):
        assert part in problem


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3", "BOOL", "I64"])
def test_factors_that_are_no_floats(dtype: str) -> None:
    (problem,) = check(lora((4, 32), (48, 4), dtype), (48, 32), "F32")
    assert dtype in problem
    assert "the.A" in problem
