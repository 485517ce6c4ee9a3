"""Every setting of every method of PEFT, one at a time at another value: merged as PEFT merges it, or refused by name.

The rows are made of PEFT's own config classes, so a setting, a method or a variant of LoRA that a later PEFT brings is
either tried here by itself or fails a test until somebody has looked at it. (Variants: `test_adapters_variants`.)
Numbers and patterns, of which a class says
no other value, are in `OPTIONS`. That which modules are chosen by a config is left to other tests.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType
from torch import Tensor

from shardmerge.adapters.formats.peft import REFUSED_TYPES
from shardmerge.adapters.registry import METHODS
from tests.support.family_oracle import (
    TOKENS,
    Case,
    Swapped,
    merged_by_peft,
    merged_by_us,
    refusal,
    unmerged,
    write_case,
)
from tests.support.peft_oracle import assert_same_bits

LINEARS = ("wide", "square", "narrow")
SWAPPED = ("wide", "narrow")


@dataclass(frozen=True)
class Method:
    """A config of a method that fits the network, and values of its settings that their types do not name."""

    settings: Mapping[str, Any]
    also: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    targets: tuple[str, ...] = LINEARS
    #: The most that ‖error‖ / ‖Δ‖ may be; 0: the bits are PEFT's. Who is nearer, `test_adapters_methods` judges.
    bound: float = 0


OPTIONS: dict[str, Method] = {
    "ADALORA": Method(
        {"init_r": 4, "total_step": 10},
        {
            "r": (3,),
            "target_r": (2,),
            "alpha_pattern": ({"wide": 3},),
            "lora_alpha": (5,),
            "layer_replication": ([[0, 1]],),
        }
        | {"tinit": (2,), "tfinal": (1,), "deltaT": (2,), "beta1": (0.5,), "beta2": (0.5,), "orth_reg_weight": (0.1,)}
        | {"qalora_group_size": (8,), "alora_invocation_tokens": ([1],), "arrow_config": ({},), "rank_pattern": ({},)}
        | {"kasa_config": ({},), "monteclora_config": ({},), "velora_config": ({},), "use_bdlora": ({"nblocks": 2},)},
    ),
    "BEFT": Method({}, targets=("wide", "narrow")),
    "BOFT": Method({"boft_block_size": 4, "boft_block_num": 0}, {"boft_n_butterfly_factor": (2, 3)}),
    "C3A": Method(
        {"block_size": 8},
        {"block_size_pattern": ({"wide": 4},), "init_weights": (True, False, "gaussian", "kaiming_uniform")},
        bound=1e-6,
    ),
    "DEFT": Method({"r": 4}, {"alpha": (3,), "init_scale": (0.5,)}, bound=1e-6),
    "DELORA": Method(
        {"r": 3}, {"rank_pattern": ({"wide": 2},), "lambda_pattern": ({"wide": 2},), "delora_lambda": (3,)}
    ),
    "FOURIERFT": Method(
        {"n_frequency": 50},
        {"random_loc_seed": (3,), "scaling": (20.0,), "n_frequency_pattern": ({"wide": 7},)},
    ),
    "FROD": Method({"sparse_rate": 0.05}, {"projection_prng_key": (5,), "regularization_alpha": (0.1,)}),
    "GLORA": Method({"r": 4}),
    "GRALORA": Method({"r": 4}, {"hybrid_r": (2,), "alpha": (5,), "gralora_k": (4,)}),
    "HIRA": Method({"r": 4}, {"rank_pattern": ({"wide": 2},), "init_weights": (False, "gaussian", None)}),
    "HRA": Method({"r": 4}),
    "IA3": Method({"feedforward_modules": ["narrow"]}, {"feedforward_modules": ([], list(LINEARS))}),
    "LN_TUNING": Method({}, targets=("norm",)),
    "LOHA": Method({"r": 3}, {"rank_pattern": ({"wide": 2},), "alpha_pattern": ({"wide": 2},), "alpha": (5,)}),
    "LOKR": Method(
        {"r": 3},
        {"rank_pattern": ({"wide": 2},), "alpha_pattern": ({"wide": 2},), "alpha": (5,), "decompose_factor": (4,)}
        | {"init_weights": (False, "lycoris")},
    ),
    "LORA": Method(
        {"r": 4},
        {"rank_pattern": ({"wide": 2},), "alpha_pattern": ({"wide": 2},), "lora_alpha": (5,)}
        | {"qalora_group_size": (8,)}
        # Whether an initialisation moves the base is tested elsewhere.
        | {"init_lora_weights": (False, "gaussian", "orthogonal", "mica")}
        | {"velora_config": ({}, {"init_type": "random", "num_groups": 5}), "kasa_config": ({}, {"beta": 1.0})}
        | {
            "monteclora_config": ({},),
            "use_bdlora": ({"nblocks": 4, "target_modules_bd_a": ["narrow", "wide", "square"]},),
        }
        | {"alora_invocation_tokens": ([1, 2],), "arrow_config": ({},), "layer_replication": ([[0, 1]],)},
    ),
    "MISS": Method({"r": 8}, {"init_weights": (False, "bat", "mini"), "mini_r": (2,)}),
    "OFT": Method({"oft_block_size": 8, "r": 0, "eps": 1.0}, {"eps": (0.5,), "num_cayley_neumann_terms": (3,)}),
    "OSF": Method(
        {"effective_rank": 6},
        {"effective_rank": (None, 0.5), "rank_pattern": ({"wide": 2},), "target_svd_config": ({"wide": 3},)},
    ),
    "PEANUT": Method({"r": 4}, {"act_fn": ("gelu",), "depth": (1,), "scaling": (0.5,)}, bound=1e-6),
    "PSOFT": Method(
        {"r": 6},
        {"psoft_alpha": (5,), "cayley_neumann_eps": (0.3,), "psoft_svd_lowrank_niter": (3,), "random_seed": (5,)}
        | {"num_cayley_neumann_terms": (3,)},
    ),
    "PVERA": Method({"r": 5}, {"projection_prng_key": (5,), "generator_seed": (3,), "d_initial": (0.5,)}),
    "RANDLORA": Method({"r": 4}, {"projection_prng_key": (5,), "randlora_alpha": (7,)}),
    "ROAD": Method({"group_size": 8}, {"variant": ("road_2", "road_4")}),
    "SHIRA": Method({"r": 2}, {"random_seed": (3,), "mask_type": ("random",)}),
    "SUPERTUNING": Method({"sparsity": 0.9}, {"r": (3,), "lora_alpha": (5.0,)}),
    "TINYLORA": Method(
        {"r": 2, "u": 5},
        {"weight_tying": (0.5,), "projection_seed": (5,), "init_weights": (False, "uniform")}
        | {"init_v_bound": (0.1,)},
    ),
    "TRAINABLE_TOKENS": Method({"token_indices": [1, 5]}, targets=("embed",)),
    "UNILORA": Method(
        {"r": 3, "save_indices": True}, {"proj_seed": (5,), "theta_d_length": (40,), "init_theta_d_bound": (0.1,)}
    ),
    "VBLORA": Method(
        {"r": 2, "num_vectors": 8, "vector_length": 4},
        {"topk": (3,), "init_vector_bank_bound": (0.1,), "init_logits_std": (0.2,)},
    ),
    "VERA": Method({"r": 4}, {"projection_prng_key": (5,), "d_initial": (0.5,)}),
    "WAVEFT": Method(
        {"n_frequency": 50},
        {"random_loc_seed": (3,), "scaling": (5.0,), "n_frequency_pattern": ({"wide": 7},), "wavelet_family": ("db2",)},
    ),
}

#: What cannot be merged, and what is said.
REFUSED = {
    ("ADALORA", "alora_invocation_tokens=[1]"): "activated LoRA",
    ("ADALORA", "arrow_config={}"): "Arrow",
    ("LORA", "use_qalora=True"): "QALoRA pools the input",
    ("ADALORA", "use_bdlora={'nblocks': 2}"): "AdaLoRA has no block-diagonal factors",
    ("ADALORA", "use_qalora=True"): "QALoRA pools the input",
    ("FROD", "save_projection=False"): "save it again with save_projection: true",
    ("HIRA", "fan_in_fan_out=True"): "goes by the layer's class",
    ("PVERA", "sample_at_inference=True"): "draws its weights at random",
    ("PVERA", "save_projection=False"): "save it again with save_projection: true",
    ("SUPERTUNING", "save_precomputed_indices=False"): "save it again with save_precomputed_indices: true",
    ("TINYLORA", "save_projection=False"): "save it again with save_projection: true",
    ("UNILORA", "save_indices=False"): "the order of the modules is not known of the base's architecture",
}
#: What PEFT itself cannot make, load or merge, and what it says.
IMPOSSIBLE = {
    ("ADALORA", "layer_replication=[[0, 1]]"): "Could not locate the layers attribute",
    ("ADALORA", "use_dora=True"): "does not support DoRA",
    ("LORA", "lora_bias=True"): "the base layer has no bias",
    ("LORA", "arrow_config={}"): "'NoneType' object has no attribute 'copy'",
    ("LORA", "alora_invocation_tokens=[1, 2]"): "does not support merging",
    ("LORA", "layer_replication=[[0, 1]]"): "Could not locate the layers attribute",
    ("SUPERTUNING", "lora_alpha=5.0"): "requires an explicit r",
}
#: Settings of every config that are not the method's, and those by which modules are chosen.
_COMMON = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"}
    | {"task_type", "runtime_config", "ensure_weight_tying", "modules_to_save", "trainable_token_indices"}
    | {"exclude_modules", "layers_pattern", "layers_to_transform", "target_modules", "target_parameters"}
)
#: Settings of LoRA that say nothing by themselves: they go with an initialisation, or with another framework.
_OF_OTHERS = frozenset(
    {"corda_config", "eva_config", "init_lora_weights", "loftq_config", "lora_ga_config"}
    | {"megatron_config", "megatron_core"}
)


@dataclass(frozen=True)
class Option:
    """One setting of a method at another value than its default."""

    method: str
    key: str
    value: Any

    @property
    def name(self) -> str:
        return f"{self.key}={self.value}"

    def case(self, folder: Path, **options: Any) -> Case:
        method = OPTIONS[self.method]
        config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(self.method)]
        settings = {**method.settings, self.key: self.value}
        targets = options.pop("targets", method.targets)
        return write_case(folder, config(target_modules=list(targets), **settings), prepare=_tame, **options)


def _tame(name: str, parameter: Tensor) -> None:
    """Some settings leave parameters as the memory is that they are given."""
    parameter.nan_to_num_(0.1).clamp_(-4, 4)


def _options() -> Iterator[Option]:
    for name, method in OPTIONS.items():
        for of in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)]):
            if of.name in method.also:
                values = method.also[of.name]
            elif of.name in _COMMON | _OF_OTHERS:
                values = ()
            else:
                values = tuple(_other_values(of, name))
            yield from (Option(name, of.name, value) for value in values)


def _other_values(of: Any, method: str) -> Iterator[Any]:
    """Values that a field's type names and its default is not."""
    if of.name == "bias":
        yield from ("all", f"{method.lower()}_only")
    elif isinstance(of.default, bool):
        yield not of.default
    elif of.name.endswith("dropout"):
        yield 0.25
    elif "Literal[" in str(of.type):
        named = re.findall(r"'(\w+)'", str(of.type).partition("Literal[")[2])
        yield from (value for value in named if value != of.default)


ROWS = list(_options())
#: Tried at once: what changes which tensors are saved, and how they are read.
QUICK = re.compile(r"save_|block_share|boft_n|init_weights=(bat|mini)|velora|kasa|use_bdlora")


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=f"{row.method}-{row.name}", marks=[] if QUICK.match(row.name) else [pytest.mark.slow])
        for row in ROWS
        if (row.method, row.name) not in IMPOSSIBLE
    ],
)
def test_a_setting_is_merged_as_peft_merges_it_or_refused(row: Option, tmp_path: Path) -> None:
    case = row.case(tmp_path)
    if (said := REFUSED.get((row.method, row.name))) is not None:
        assert said in refusal(case)
        return
    compare(case, tmp_path / "out", OPTIONS[row.method].bound)


def compare(case: Case, output: Path, bound: float) -> None:
    """Against PEFT's merge, and the outputs of what is merged against those of base + adapter."""
    ours, theirs, before = merged_by_us(case, output), merged_by_peft(case), case.net.state_dict()
    theirs = {name: theirs[name] for name in before if name in theirs}
    if bound:
        change = sum(float((of - before[name]).norm()) ** 2 for name, of in theirs.items()) ** 0.5
        off = sum(float((of - ours[name]).norm()) ** 2 for name, of in theirs.items()) ** 0.5
        assert off <= bound * change
    else:
        assert_same_bits({name: ours[name] for name in theirs}, theirs)
    merged = copy.deepcopy(case.net)
    merged.load_state_dict(ours)
    with torch.inference_mode():
        wanted = unmerged(case)(TOKENS)
        assert (merged(TOKENS) - wanted).abs().max() <= 1e-4 * wanted.abs().max()
        assert (case.net(TOKENS) - wanted).abs().max() > 1e-3 * wanted.abs().max()


IMPOSSIBLE_ROWS = [row for row in ROWS if (row.method, row.name) in IMPOSSIBLE]


@pytest.mark.slow
@pytest.mark.parametrize("row", IMPOSSIBLE_ROWS, ids=lambda row: f"{row.method}-{row.name}")
def test_what_peft_cannot_merge(row: Option, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=re.escape(IMPOSSIBLE[row.method, row.name])):
        merged_by_peft(row.case(tmp_path))


#: Methods that PEFT lets one put on a Conv1D, whose weight is (in, out); the network has no square one.
TURNED: tuple[str, ...] = (
    "ADALORA",
    "DEFT",
    "FOURIERFT",
    "GRALORA",
    "HIRA",
    "IA3",
    "LORA",
    "PVERA",
    "RANDLORA",
    "TINYLORA",
    "UNILORA",
)
TURNED += ("VBLORA", "VERA", "WAVEFT")


#: Methods that PEFT puts there, but to no use; and those to which it is nothing of what kind the layers are.
EMPTY = {"FROD": "(in, in) of narrow", "OSF": "holds no tensors"}
ANY_LAYER = ("LN_TUNING", "TRAINABLE_TOKENS")


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=[] if name in ("HIRA", "BOFT", "OSF") else [pytest.mark.slow])
        for name in OPTIONS
        if name not in ANY_LAYER
    ],
)
@pytest.mark.parametrize("flag", [False, True])
def test_conv1d_whatever_the_flag_says(method: str, flag: bool, tmp_path: Path) -> None:
    """The layer's class decides, and PEFT corrects the flag. Where a Conv1D cannot be updated, PEFT or we say so."""
    named = {of.name for of in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)])}
    if "fan_in_fan_out" not in named and flag:
        pytest.skip("there is no flag")
    row = Option(method, *(("fan_in_fan_out", flag) if "fan_in_fan_out" in named else ("inference_mode", False)))
    options: dict[str, Any] = {"make": Swapped, "targets": SWAPPED}
    if method in TURNED:
        compare(row.case(tmp_path, **options), tmp_path / "out", OPTIONS[method].bound)
    elif method in EMPTY:
        assert EMPTY[method] in refusal(row.case(tmp_path, **options))
    else:
        with pytest.raises(Exception, match=r"not support|'Conv1D' object has no attribute 'in_features'"):
            row.case(tmp_path, **options)


# --- what a later PEFT may bring --------------------------------------------------------------------------------------


def test_every_type_is_merged_or_refused_by_name() -> None:
    assert {kind.value for kind in PeftType} == METHODS.keys() - {"BONE"} | REFUSED_TYPES.keys()
    assert {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING} == {kind.value for kind in PeftType}


def test_every_method_is_tried_here() -> None:
    assert OPTIONS.keys() == METHODS.keys() - {"BONE"}, "BONE is no type of this PEFT; see test_adapters_miss"


@pytest.mark.parametrize("method", OPTIONS)
def test_every_setting_is_known(method: str) -> None:
    """That is: read, or known to mean nothing to a merge, or refused."""
    reader = METHODS[method]
    known = reader.settings.keys() | reader.inert | reader.refused.keys() | _COMMON | {"bias", "fan_in_fan_out"}
    named = {of.name for of in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)])}
    assert named <= known


@pytest.mark.parametrize("method", OPTIONS)
def test_every_setting_is_tried(method: str) -> None:
    tried = {row.key for row in ROWS if row.method == method}
    named = {of.name for of in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)])}
    assert named - tried - _COMMON - _OF_OTHERS <= OPTIONS[method].settings.keys()
