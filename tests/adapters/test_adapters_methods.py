"""Methods of PEFT that are a file each: what shardmerge makes of them is what PEFT makes, and what base + adapter do.

A row is an adapter of some settings on some network. Where PEFT rounds once, the bits are the same; elsewhere our
error is no larger than PEFT's. Where PEFT's own float64 cannot judge, since it casts to float32 in between, the row
brings its judge.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.boft import layer as boft_layer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import shardmerge
from tests.support.builders import slow_if
from tests.support.family_oracle import (
    TOKENS,
    Case,
    Net,
    Swapped,
    Tall,
    assert_equals_peft,
    assert_no_worse_than_peft,
    assert_same_outputs,
    assert_tiles_agree,
    assert_weights_equal_peft,
    exact_weights,
    merged_by_peft,
    merged_by_us,
    refusal,
    unmerged,
    write_case,
)
from tests.support.peft_oracle import least_memory, make_config

Exact = Callable[[Case], Mapping[str, Tensor]]
Make = Callable[[], nn.Module]
LINEARS = ("wide", "square", "narrow")
ALL = ("float32", "bfloat16", "float16")


class Square(nn.Module):
    """Convolutions with square kernels, of nine points and of one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, 24)
        self.conv = nn.Conv2d(2, 20, 3, padding=1)
        self.point = nn.Conv2d(20, 18, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.as_tensor(self.point(torch.tanh(self.conv(self.embed(tokens).view(len(tokens), 2, 12, -1)))))


class Deep(nn.Module):
    """A convolution in three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, 24)
        self.conv = nn.Conv3d(2, 6, 3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.as_tensor(self.conv(self.embed(tokens).view(len(tokens), 2, 3, 4, -1)))


@dataclass(frozen=True)
class Row:
    """An adapter. ``bits``: the dtypes of the base for which the bits are PEFT's; for the others ``exact`` judges."""

    method: str
    settings: Mapping[str, Any]
    targets: tuple[str, ...] = LINEARS
    bits: tuple[str, ...] = ALL
    dtypes: tuple[str, ...] = ("float32",)
    make: Make = Net
    scale: float = 0.2
    exact: Exact = exact_weights
    tiles: bool = False
    #: Whether biases are multiplied by a matrix, whose bits depend on the processor.
    rotates_biases: bool = False

    @property
    def name(self) -> str:
        settings = ",".join(f"{key}={value}" for key, value in self.settings.items())
        return f"{self.method}-{self.make.__name__}-{settings}"

    def config(self) -> Any:
        return getattr(peft, f"{self.method}Config")(target_modules=list(self.targets), **self.settings)

    def case(self, folder: Path, dtype: str = "float32") -> Case:
        return write_case(folder, self.config(), dtype=dtype, make=self.make, scale=self.scale)


# --- judges -----------------------------------------------------------------------------------------------------------


def _adapter(case: Case) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = load_file(case.adapter / "adapter_model.safetensors")
    return tensors, json.loads((case.adapter / "adapter_config.json").read_text())


def _weights(case: Case, factor: str) -> dict[str, Tensor]:
    """Module → one of its factors, in float64."""
    end = f".{factor}"
    return {
        name.removeprefix("base_model.model.").removesuffix(end): tensor.double()
        for name, tensor in _adapter(case)[0].items()
        if name.endswith(end)
    }


def _changed(case: Case, change: Callable[[str, Tensor], Tensor], modules: Mapping[str, Any]) -> dict[str, Tensor]:
    """The base in float64 with the modules' weights changed."""
    state = {name: tensor.double() for name, tensor in case.net.state_dict().items()}
    return state | {f"{module}.weight": change(module, state[f"{module}.weight"]) for module in modules}


def in_float32(case: Case) -> Mapping[str, Tensor]:
    """PEFT's merge into the same base in float32: exact enough to judge 16 bits by."""
    model = peft.PeftModel.from_pretrained(copy.deepcopy(case.net).float(), case.adapter)
    return {name: tensor.double() for name, tensor in model.merge_and_unload().state_dict().items()}


def c3a_exact(case: Case) -> dict[str, Tensor]:
    kernels = _weights(case, "c3a_kernel")

    def change(module: str, weight: Tensor) -> Tensor:
        kernel = kernels[module]
        size = kernel.shape[2]
        there = (torch.arange(size)[None, :] - torch.arange(size)[:, None]) % size
        blocks = kernel[:, :, there].permute(0, 2, 1, 3).reshape(weight.shape)
        return weight + blocks / weight.shape[1]

    return _changed(case, change, kernels)


def deft_exact(case: Case) -> dict[str, Tensor]:
    outer, inner, config = _weights(case, "deft_P"), _weights(case, "deft_R"), _adapter(case)[1]

    def change(module: str, weight: Tensor) -> Tensor:
        swapped = bool(config["fan_in_fan_out"])
        weight, p = (weight.T if swapped else weight), outer[module]
        right = torch.linalg.qr(p)[0] if config["decomposition_method"] == "qr" else p.relu()
        left = right if config["decomposition_method"] == "qr" else p
        put = inner[module] * (config["alpha"] / p.shape[1] if config["alpha"] else 1) if inner else 0
        weight = weight + left @ (put - right.T @ weight)
        return weight.T if swapped else weight

    return _changed(case, change, outer)


def frod_exact(case: Case) -> dict[str, Tensor]:
    tensors = _adapter(case)[0]
    diagonals, values = _weights(case, "frod_lambda_l"), _weights(case, "frod_lambda_s_values")

    def change(module: str, weight: Tensor) -> Tensor:
        basis = tensors[f"base_model.frod_V.{module}"].double()
        directions = torch.linalg.solve(basis, weight.T).T
        directions = (directions / directions.norm(dim=0)).float().to(case.net.get_parameter(f"{module}.weight").dtype)
        rows, columns = tensors[f"base_model.frod_s_indices.{module}"]
        middle = torch.diag(diagonals[module])
        middle[rows, columns] += values[module]
        return torch.as_tensor(directions.double() @ middle @ basis.T)

    return _changed(case, change, diagonals)


def kasa_exact(case: Case) -> dict[str, Tensor]:
    """W without its r smallest singular values, as PEFT keeps it, and the update in float64."""
    config = _adapter(case)[1]
    left, right, diagonal = (_weights(case, factor) for factor in ("lora_B.weight", "lora_A.weight", "lora_diag"))

    def change(module: str, weight: Tensor) -> Tensor:
        rank = len(diagonal[module])
        u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
        cut = ((u[:, :-rank] * s[:-rank]) @ v[:-rank]).to(case.net.get_parameter(f"{module}.weight").dtype)
        update = left[module] @ torch.diag(diagonal[module]) @ right[module]
        return torch.as_tensor(cut.double() + config["lora_alpha"] / rank * update)

    return _changed(case, change, diagonal)


# --- rows -------------------------------------------------------------------------------------------------------------

F32 = ("float32",)
TALL = ("tall", "wide")
SWAPPED = ("wide", "narrow")
ROWS = [
    Row("LNTuning", {}, ("norm", "wide"), dtypes=ALL),
    Row("Lora", {"r": 4, "kasa_config": {}}, bits=F32, exact=kasa_exact, dtypes=ALL),
    Row("Lora", {"r": 4, "kasa_config": {}, "rank_pattern": {"square": 3}, "use_rslora": True}, ("square", "head")),
    Row("Lora", {"r": 4, "kasa_config": {}, "lora_bias": True}, ("wide", "narrow")),
    Row("Lora", {"r": 7, "kasa_config": {}}, TALL, make=Tall, tiles=True),
    Row("Hira", {"r": 4}, (*LINEARS, "head", "embed", "conv1", "conv2"), F32, ALL),
    Row("Hira", {"r": 4}, ("conv",), F32, make=Deep),
    Row("Hira", {"r": 5}, (*TALL, "conv"), F32, make=Tall, tiles=True),
    Row("Hira", {"r": 5, "fan_in_fan_out": True}, SWAPPED, F32, make=Swapped, tiles=True),
    Row("HRA", {"r": 4}, dtypes=ALL),
    Row("HRA", {"r": 3, "apply_GS": True}),
    Row("HRA", {"r": 4}, ("conv", "point"), make=Square),
    Row("HRA", {"r": 5}, (*TALL, "conv"), make=Tall, tiles=True),
    Row("OFT", {"oft_block_size": 8}, (*LINEARS, "embed"), dtypes=ALL),
    Row("OFT", {"oft_block_size": 8, "block_share": True}, (*LINEARS, "embed")),
    Row("OFT", {"oft_block_size": 0, "r": 2, "use_cayley_neumann": False}, (*LINEARS, "embed")),
    Row("OFT", {"oft_block_size": 8, "coft": True, "eps": 1.5}),
    Row("OFT", {"oft_block_size": 8, "coft": True, "eps": 0.3, "block_share": True}),
    Row("OFT", {"oft_block_size": 5, "num_cayley_neumann_terms": 3}),  # 5 divides none: PEFT takes a divisor near it
    *(Row("OFT", {"oft_block_size": 4, "num_cayley_neumann_terms": terms}) for terms in (2, 4, 7)),
    Row("OFT", {"oft_block_size": 5}, ("point",), make=Square),
    Row("OFT", {"oft_block_size": 32}, TALL, make=Tall, tiles=True),
    Row("BOFT", {"boft_block_size": 4}, scale=0.3, dtypes=ALL),
    Row("BOFT", {"boft_block_size": 0, "boft_block_num": 2}, scale=0.3),
    # Without its kernel, as here, PEFT trains and loads one factor; 3 would not even divide the layers' blocks.
    Row("BOFT", {"boft_block_size": 4, "boft_n_butterfly_factor": 3}, scale=0.3),
    Row("BOFT", {"boft_block_size": 3, "boft_n_butterfly_factor": 2}, ("conv",), make=Square, scale=0.3),
    Row("BOFT", {"boft_block_size": 2}, ("conv", "point"), make=Square, scale=0.3),
    Row("BOFT", {"boft_block_size": 12}, (*TALL, "conv"), make=Tall, scale=0.3, tiles=True),
    *(Row("Road", {"variant": f"road_{n}", "group_size": 8}, bits=F32, scale=0.5, dtypes=ALL) for n in (1, 2, 4)),
    *(
        Row("Road", {"variant": "road_4", "group_size": g}, TALL, F32, make=Tall, tiles=True, rotates_biases=True)
        for g in (2, 32, 96)
    ),
    Row("C3A", {"block_size": 8, "block_size_pattern": {"square": 14}}, bits=(), exact=c3a_exact, dtypes=ALL, scale=5),
    *(Row("C3A", {"block_size": size}, TALL, (), make=Tall, exact=c3a_exact, scale=5, tiles=True) for size in (1, 24)),
    *(Row("Gralora", {"r": 4, "gralora_k": 2, "hybrid_r": h, "alpha": 7}, dtypes=ALL) for h in (0, 3)),
    Row("Gralora", {"r": 8, "gralora_k": 4, "alpha": 7}),
    Row("Gralora", {"r": 6, "gralora_k": 3, "hybrid_r": 2}, TALL, make=Tall, tiles=True),
    Row("Gralora", {"r": 6, "gralora_k": 3, "hybrid_r": 2, "fan_in_fan_out": True}, SWAPPED, make=Swapped, tiles=True),
    Row("Glora", {"r": 4}, bits=F32, dtypes=ALL),
    Row("Glora", {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}, bits=F32),
    Row("Glora", {"config_A_B": "constant", "config_C": "none", "config_D_E": "none"}, bits=F32),
    Row("Glora", {"config_A_B": "none", "config_C": "none"}, bits=F32),
    Row("Glora", {"r": 4}, TALL, F32, make=Tall, tiles=True),
    Row("Beft", {}, ("wide", "narrow", "head"), dtypes=ALL),
    Row("FourierFT", {"n_frequency": 100, "n_frequency_pattern": {"wide": 7}}, scale=1, dtypes=ALL),
    Row("FourierFT", {"n_frequency": 999}, TALL, make=Tall, scale=1, tiles=True),
    Row("FourierFT", {"n_frequency": 999, "fan_in_fan_out": True}, SWAPPED, make=Swapped, scale=1, tiles=True),
    Row("WaveFT", {"n_frequency": 100, "n_frequency_pattern": {"wide": 7}}, scale=1, dtypes=ALL),
    *(Row("WaveFT", {"n_frequency": 99, "wavelet_family": of}, scale=1) for of in ("db3", "sym4", "coif2")),
    Row("WaveFT", {"n_frequency": 99, "use_idwt": False, "proportional_parameters": True}, scale=1),
    Row("WaveFT", {"n_frequency": 999, "wavelet_family": "sym2"}, TALL, make=Tall, scale=1, tiles=True),
    Row("WaveFT", {"n_frequency": 999, "fan_in_fan_out": True}, SWAPPED, make=Swapped, scale=1, tiles=True),
    Row("Psoft", {"r": 8, "psoft_alpha": 13}, bits=F32, exact=in_float32, dtypes=ALL),
    Row("Psoft", {"r": 8, "ab_svd_init": "pissa_init", "psoft_mag_a": False}, bits=F32, exact=in_float32),
    Row("Psoft", {"r": 8, "psoft_svd": "lowrank", "psoft_orth": False}, bits=F32, exact=in_float32),
    Row("Psoft", {"r": 8, "use_cayley_neumann": True, "cayley_neumann_eps": 0.3, "psoft_mag_b": False}),
    Row("Psoft", {"r": 8}, TALL, F32, make=Tall, exact=in_float32, tiles=True),
    Row("Pvera", {"r": 5}, dtypes=ALL),
    Row("Pvera", {"r": 5}, TALL, make=Tall, tiles=True),
    Row("Pvera", {"r": 5, "fan_in_fan_out": True}, SWAPPED, make=Swapped, tiles=True),
    Row("UniLora", {"r": 5, "save_indices": True}, scale=1, dtypes=ALL),
    Row("UniLora", {"r": 5, "save_indices": True}, TALL, make=Tall, scale=1, tiles=True),
    Row("UniLora", {"r": 5, "save_indices": True, "fan_in_fan_out": True}, SWAPPED, make=Swapped, scale=1, tiles=True),
    Row("TinyLora", {"r": 3, "u": 7}, (*LINEARS, "embed"), scale=0.5, dtypes=ALL),
    *(Row("TinyLora", {"u": 7, "weight_tying": tie}, (*LINEARS, "embed"), scale=0.5) for tie in (0.5, 1.0)),
    Row("TinyLora", {"r": 3, "u": 7}, TALL, make=Tall, scale=0.5, tiles=True),
    Row("TinyLora", {"r": 3, "u": 7, "fan_in_fan_out": True}, SWAPPED, make=Swapped, scale=0.5, tiles=True),
    Row("Deft", {"r": 4}, bits=(), exact=deft_exact, dtypes=ALL),
    Row("Deft", {"r": 4, "decomposition_method": "qr", "alpha": 7}, bits=(), exact=deft_exact),
    Row("Deft", {"r": 4, "para": True}, bits=(), exact=deft_exact),
    Row("Deft", {"r": 4}, TALL, (), make=Tall, exact=deft_exact),
    Row("Deft", {"r": 4, "fan_in_fan_out": True}, SWAPPED, (), make=Swapped, exact=deft_exact, tiles=True),
    Row("Frod", {"sparse_rate": 0.05, "progressbar": False}, bits=F32, exact=frod_exact, dtypes=ALL),
    Row("Frod", {"progressbar": False}, ("tall",), F32, make=Tall, exact=frod_exact, tiles=True),
    Row("Peanut", {"r": 4}, bits=(), dtypes=ALL),
    Row("Peanut", {"r": 4, "depth": 2, "act_fn": "gelu", "scaling": 0.7}, bits=()),
    *(Row("Peanut", {"r": 4, "depth": 1, "act_fn": of}, bits=()) for of in ("silu", "tanh", "gelu_new")),
    *(Row("Peanut", {"r": 4, "act_fn": of}, bits=()) for of in ("mish", "quick_gelu", "relu2", "relu6")),
    *(Row("Peanut", {"r": 4, "act_fn": of}, bits=()) for of in ("leaky_relu", "sigmoid", "linear")),
    Row("Peanut", {"r": 4, "depth": 1}, TALL, (), make=Tall),
    Row("OSF", {"effective_rank": 6}, scale=0.05, dtypes=ALL),
    Row("OSF", {"effective_rank": 0.3, "rank_pattern": {"sq": 5}}, scale=0.05),
    Row("OSF", {}, TALL, make=Tall, scale=0.05, tiles=True),
    Row("Supertuning", {"sparsity": 0.9}, bits=F32, dtypes=ALL),
    Row("Supertuning", {"sparsity": 0.9, "r": 3, "lora_alpha": 5}, bits=F32),
    Row("Supertuning", {"sparsity": 0.9, "r": 3}, TALL, F32, make=Tall, tiles=True),
]
#: One row of every method, its first.
FIRST = list({row.method: row for row in reversed(ROWS)}.values())


def rows(of: list[Row], quick: int | None = None) -> pytest.MarkDecorator:
    """A test of these rows; all but the first ``quick`` ones are slow."""
    cut = len(of) if quick is None else quick
    marked = [pytest.param(row, id=row.name, marks=[pytest.mark.slow] * (at >= cut)) for at, row in enumerate(of)]
    return pytest.mark.parametrize("row", marked)


@pytest.mark.parametrize(
    ("row", "dtype"),
    [
        # In the ordinary suite every row in one of its dtypes, in turns.
        pytest.param(row, dtype, id=f"{row.name}-{dtype}", marks=slow_if((number + at) % len(row.dtypes)))
        for number, row in enumerate(ROWS)
        for at, dtype in enumerate(row.dtypes)
    ],
)
def test_merge(row: Row, dtype: str, tmp_path: Path) -> None:
    case = row.case(tmp_path, dtype)
    if dtype in row.bits:
        ours = (assert_weights_equal_peft if row.rotates_biases else assert_equals_peft)(case, tmp_path / "out")
    else:
        ours = assert_no_worse_than_peft(case, tmp_path / "out", exact=row.exact)
    if dtype == "float32":
        assert_same_outputs(case, ours)
        if row.tiles:
            assert_tiles_agree(case, tmp_path / "tiles", ours)


# --- what is wrong is told --------------------------------------------------------------------------------------------


def rewrite(case: Case, tensors: Mapping[str, Tensor]) -> None:
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in tensors.items()},
        case.adapter / "adapter_model.safetensors",
    )


#: Tensors whose shape does not matter: PVeRA's B may have more rows than a module, and PEFT stores zeros for biases
#: that are not there.
HARMLESS = ("frod_s_size", "pvera_B", "square.glora_C", "square.glora_D", "square.glora_E")


@rows(FIRST)
def test_missing_misshaped_and_extra_tensors_are_refused(row: Row, tmp_path: Path) -> None:
    case = row.case(tmp_path)
    whole = _adapter(case)[0]
    several = (
        sum(".wide." in name for name in whole) > 1 and row.method != "LNTuning"
    )  # else nothing is amiss without it
    for name, tensor in whole.items():
        rest = {other: kept for other, kept in whole.items() if other != name}
        if several and ("pvera_B" in name or not any(part in name for part in HARMLESS)):
            rewrite(case, rest)
            assert any(word in refusal(case) for word in ("without", "missing")), name
        if any(part in name for part in HARMLESS):
            continue
        for changed in (torch.cat((tensor, tensor)), tensor[None]):
            rewrite(case, {**rest, name: changed})
            assert name in refusal(case), (name, changed.shape)
    rewrite(case, {**whole, "base_model.model.wide.unheard_of": torch.zeros(2)})
    assert "unheard_of" in refusal(case)


ODD = ["x", "", [], {}, [1], {"wide": "x"}, {"(": 1}, True, None, -1, 0, 1, 3, 1 << 40, 10**400, 0.5, -0.5, 1e300]


@rows(FIRST, quick=5)
def test_odd_settings_are_merged_or_refused(row: Row, tmp_path: Path) -> None:
    """Never anything else: no crash at values of other types, and no work without a bound."""
    case = row.case(tmp_path)
    file = case.adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    plan = {"base": str(case.base), "adapters": [str(case.adapter)], "output": {"path": str(tmp_path / "out")}}
    common = {"auto_mapping", "base_model_name_or_path", "peft_type", "peft_version", "revision", "task_type"}
    for key in config.keys() - common:
        for value in ODD:
            file.write_text(json.dumps({**config, key: value}))
            try:
                shardmerge.plan(plan)
            except shardmerge.ShardmergeError as error:
                assert "nothing was written" in str(error).lower()


@rows(FIRST)
def test_unknown_setting_is_refused(row: Row, tmp_path: Path) -> None:
    assert "'unheard_of' is unknown" in refusal(row.case(tmp_path), unheard_of=3)


def row_of(method: str, **settings: Any) -> Row:
    return next(row for row in ROWS if row.method == method and settings.items() <= row.settings.items())


@pytest.mark.parametrize(
    ("row", "changes", "parts"),
    [
        (row_of("Hira"), {"r": 5}, ["have rank 4 and 4", "says 5"]),
        (row_of("HRA"), {"r": 5}, ["hra_u is [24, 4]", "expected [24, 5]"]),
        (row_of("OFT"), {"oft_block_size": 12}, ["oft_R.weight is [3, 28]", "expected [2, 66]", "block size 12"]),
        (row_of("OFT"), {"r": 2}, ["one of r and oft_block_size"]),
        (row_of("OFT"), {"oft_block_size": None}, ["oft_block_size must be a whole number", "0.14"]),
        (row_of("OFT"), {"num_cayley_neumann_terms": 1001}, ["from 1 to 1000"]),
        (row_of("BOFT"), {"boft_block_size": 5}, ["do not divide its 24 inputs"]),
        (row_of("Road"), {"group_size": 7}, ["an even number above zero"]),
        (row_of("Road"), {"group_size": 10}, ["56 outputs, which groups of 10 do not divide"]),
        (row_of("Road"), {"variant": "road_2"}, ["road_theta is [28]", "expected [56]"]),
        (row_of("C3A"), {"block_size": 5}, ["blocks of 5 do not divide"]),
        (row_of("Gralora"), {"gralora_k": 3}, ["gralora_k, 3, must divide r, 4"]),
        (row_of("Gralora"), {"gralora_k": 4}, ["gralora_A is [2, 12, 4]", "expected [4, 6, 4]"]),
        (
            row_of("Gralora", hybrid_r=3),
            {"hybrid_r": 0},
            ["gralora_A_general.weight is there", "not say hybrid_r"],
        ),
        (row_of("Glora"), {"config_A_B": "vector"}, ["glora_A"]),
        (row_of("Glora"), {"config_C": "matrix"}, ["one of lora, vector, none"]),
        (row_of("FourierFT"), {"n_frequency": 50}, ["fourierft_spectrum is [100]", "expected [50]"]),
        (row_of("WaveFT"), {"wavelet_family": "db11"}, ["a wavelet that PEFT has the filters of"]),
        (row_of("Pvera"), {"sample_at_inference": True}, ["draws its weights at random", "merge the mean"]),
        (row_of("UniLora"), {"save_indices": False}, ["does not say save_indices", "PEFT would ignore it"]),
        (row_of("Supertuning"), {"sparsity": 0.8}, ["supertuning_values is [134]", "expected [268]"]),
        (row_of("Supertuning"), {"r": 3}, ["adapter_config.json says r, but"]),
        (row_of("Deft"), {"para": True}, ["does not say para: false; PEFT would ignore it"]),
        (row_of("Peanut"), {"depth": 1}, ["says depth 1"]),
        (row_of("Peanut"), {"act_fn": "snake"}, ["act_fn must be one of gelu, gelu_fast"]),
        (row_of("OSF"), {"effective_rank": 5}, ["U_low is [56, 18]", "expected [56, 19]"]),
        (row_of("Psoft"), {"psoft_orth": False}, ["psoft_R.weight is [28]", "expected [8, 8]"]),
        (row_of("Psoft"), {"psoft_mag_a": False}, ["does not say psoft_mag_a"]),
        (row_of("TinyLora"), {"u": 8}, ["tinylora_P is [7, 3, 3]", "expected [8, 3, 3]"]),
        (row_of("TinyLora"), {"r": 4}, ["tinylora_A is [3, 24]", "expected [4, 24]"]),
    ],
    ids=lambda value: value.method if isinstance(value, Row) else "",
)
def test_config_that_does_not_fit(row: Row, changes: dict[str, Any], parts: list[str], tmp_path: Path) -> None:
    said = refusal(row.case(tmp_path), **changes)
    for part in parts:
        assert part in said, said


@pytest.mark.parametrize(
    ("row", "role"), [(row_of("UniLora"), "unilora_indices_B"), (row_of("Supertuning"), "supertuning_indices")]
)
@pytest.mark.parametrize("wrong", [-1, 1 << 30])
def test_place_beyond_the_weight_stops_the_merge(row: Row, role: str, wrong: int, tmp_path: Path) -> None:
    case = row.case(tmp_path)
    tensors = _adapter(case)[0]
    tensors[f"base_model.model.square.{role}"].view(-1)[-1] = wrong
    rewrite(case, tensors)
    with pytest.raises(shardmerge.ShardmergeError, match=f"square.{role} holds the numbers"):
        merged_by_us(case, tmp_path / "out")


# --- one by one -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [2, 32, 96])
def test_tiles_hold_whole_groups_of_road(group: int, tmp_path: Path) -> None:
    case = row_of("Road", variant="road_4", group_size=group).case(tmp_path)
    config = make_config(tmp_path / "out", case.base, [case.adapter])
    config["compute"]["max_memory"] = least_memory(config)
    tensors = {tensor.source.name: tensor for tensor, _ in shardmerge.plan(config).updates()}
    ranges = list(tensors["tall.weight"].ranges())
    assert len(ranges) > 1
    assert all(of.start % group == of.stop % group == 0 for of in ranges)
    assert (ranges[0].start, ranges[-1].stop) == (0, 768)


@pytest.mark.parametrize("peft_type", ["ADAMSS", "LILY", "POLY", "SHADOW", "XLORA"])
def test_methods_without_a_merge_are_refused_with_the_way_out(peft_type: str, tmp_path: Path) -> None:
    said = refusal(row_of("Beft").case(tmp_path), peft_type=peft_type)
    assert f"peft_type {peft_type}: " in said
    assert any(way in said for way in ("load both with PEFT", "merge it with PEFT", "merge one of them"))


def test_the_rows_of_adamss_are_in_none_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groupings of the same sizes load the same files without a word, and merge to different weights."""

    class Grouping:
        shift = 0

        def __init__(self, n_clusters: int, **_: Any) -> None:
            self.count = n_clusters

        def fit_predict(self, vectors: Any) -> Any:
            return (torch.arange(len(vectors)) // (len(vectors) // self.count)).roll(self.shift).numpy()

    clusters = types.ModuleType("sklearn.cluster")
    clusters.KMeans = Grouping  # type: ignore[attr-defined]
    for name, module in (("sklearn", types.ModuleType("sklearn")), ("sklearn.cluster", clusters)):
        monkeypatch.setitem(sys.modules, name, module)
    case = write_case(tmp_path, peft.AdamssConfig(r=6, num_subspaces=4, target_modules=["square"]))
    assert not [name for name, tensor in _adapter(case)[0].items() if not tensor.is_floating_point()]
    merged = [merged_by_peft(case)["square.weight"]]
    Grouping.shift = 5
    merged.append(merged_by_peft(case)["square.weight"])
    assert not torch.allclose(merged[0], merged[1], atol=1e-3)
    assert "which rows each of its subspaces has is not in its files" in refusal(case)


def test_oft_on_a_convolution_of_more_than_one_point(tmp_path: Path) -> None:
    """PEFT's forward of an untrained adapter, which ought to do nothing, already differs from the base's."""
    case = write_case(tmp_path, peft.OFTConfig(oft_block_size=6, target_modules=["conv"]), make=Square, scale=0)
    with torch.inference_mode():
        assert not torch.allclose(unmerged(case)(TOKENS), case.net(TOKENS), atol=1e-2)
    assert "sums patches that overlap" in refusal(case)


def test_oft_of_an_older_peft_is_warned_of(tmp_path: Path) -> None:
    case = row_of("OFT").case(tmp_path)
    file = case.adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "peft_version": "0.17.1"}))
    plan = shardmerge.plan(
        {"base": str(case.base), "adapters": [str(case.adapter)], "output": {"path": str(tmp_path / "x")}}
    )
    assert sum("before 0.18" in warning for warning in plan.warnings) == 1


class _Butterflies:
    """What PEFT's CUDA extension computes: block-diagonal matrices."""

    def forward(self, blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*of) for of in blocks])]  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("factors", [2, 3])
def test_boft_of_several_butterflies(factors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT knows them on CUDA only, where it multiplies the rotations first; we rotate W by one after the other."""
    monkeypatch.setattr(boft_layer, "get_fbd_cuda", lambda: _Butterflies())
    config = peft.BOFTConfig(
        boft_block_size=4, boft_n_butterfly_factor=factors, target_modules=["tall", "wide", "conv"]
    )
    with monkeypatch.context() as patch:
        patch.setattr(Tall, "__init__", _tall_with_even_blocks)
        case = write_case(tmp_path, config, make=Tall, scale=0.3)
    ours, exact = merged_by_us(case, tmp_path / "out"), exact_weights(case)
    for name in ("tall.weight", "wide.weight", "conv.weight"):
        assert (ours[name] - exact[name]).abs().max() < 1e-6 * exact[name].abs().max()
    assert_same_outputs(case, ours)
    assert_tiles_agree(case, tmp_path / "tiles", ours)
    said = refusal(case, boft_n_butterfly_factor=5 - factors)
    assert f"expected [{5 - factors}, 24, 4, 4]" in said or f"{5 - factors} butterfly factors" in said
    assert "do not divide its 96 inputs" in refusal(case, boft_n_butterfly_factor=1 << 30)


def _tall_with_even_blocks(self: Tall) -> None:
    nn.Module.__init__(self)
    self.embed, self.tall, self.wide = nn.Embedding(37, 96), nn.Linear(96, 768), nn.Linear(768, 96)
    self.conv = nn.Conv2d(4, 240, 2)


def test_tinylora_whose_vectors_cannot_be_told_apart(tmp_path: Path) -> None:
    case = row_of("TinyLora").case(tmp_path)
    file = case.adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "projection_seed": 1}))
    with pytest.raises(shardmerge.ShardmergeError, match="was not drawn from projection_seed 1"):
        merged_by_us(case, tmp_path / "out")


def test_glora_reads_the_base_as_it_was(tmp_path: Path) -> None:
    """A bias that is made from the base's weight cannot come after another adapter that changes the weight."""
    case = row_of("Glora").case(tmp_path / "one")
    other = row_of("Hira").case(tmp_path / "two")
    config = {"base": str(case.base), "output": {"path": str(tmp_path / "out")}}
    shardmerge.plan({**config, "adapters": [str(case.adapter), str(other.adapter)]})
    with pytest.raises(shardmerge.PlanError, match=r"needs wide\.weight as it is"):
        shardmerge.plan({**config, "adapters": [str(other.adapter), str(case.adapter)]})


class Taller(Tall):
    """Four times the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.tall, self.wide = nn.Linear(96, 3072), nn.Linear(3072, 96)
        self.conv = nn.Conv2d(4, 960, 3, padding=1)


ROW_LOCAL = ("Hira", "HRA", "OFT", "BOFT", "C3A", "Glora", "Pvera", "TinyLora")


@rows([dataclasses.replace(row, targets=("tall",)) for row in ROWS if row.make is Tall and row.method in ROW_LOCAL])
def test_memory_does_not_depend_on_the_number_of_rows(row: Row, tmp_path: Path) -> None:
    sizes = []
    for make in (Tall, Taller):
        case = dataclasses.replace(row, make=make).case(tmp_path / make.__name__)
        sizes.append(least_memory(make_config(tmp_path / "out", case.base, [case.adapter])))
    assert sizes[1] <= 1.1 * sizes[0], sizes
