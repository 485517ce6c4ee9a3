"""`compute.device: cuda`, as far as that can be tested without: on a device that is pretended
(`tests.support.pretended_cuda`).

Its numbers are computed by the CPU, so that the bits must be those of a merge on the CPU, whatever the family; what a
GPU would stumble over raises. Only the tests at the end need a GPU; they bound how far its sums may be from the CPU's.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import shardmerge
from shardmerge.adapters.registry import FAMILIES
from shardmerge.codecs import rounding
from shardmerge.execution import worker
from shardmerge.execution.devices import CudaDevice
from shardmerge.execution.factors import LazyFactors
from shardmerge.execution.fidelity import Sampler
from shardmerge.execution.worker import ComputeThreads
from shardmerge.planning import tiling
from shardmerge.sources.source import OpenReaders
from shardmerge.system import torch_devices
from tests.support.builders import slow_but
from tests.support.device_cases import NAMES, TALL, _of, config_of, files
from tests.support.family_oracle import Tall, write_case
from tests.support.gguf_zoo import make as make_for_gguf
from tests.support.peft_oracle import least_memory, make_config, random, stored, write_adapter, write_base
from tests.support.pretended_cuda import DEVICE, MisuseError, OnDevice, PretendedCuda, every_tile

pytestmark = pytest.mark.usefixtures("one_thread")
WORKERS = 2


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> PretendedCuda:
    made = PretendedCuda()
    made.install(monkeypatch)
    monkeypatch.setattr(worker, "resolve_device", lambda name, **_: DEVICE if name == "cuda" else torch.device(name))
    monkeypatch.setattr(torch_devices, "missing", lambda name, setting="": None)  # the plan asks for it, too
    share = ComputeThreads.share

    def checked(self: Any, items: Any, work: Any) -> Any:
        return share(self, items, every_tile(made, work))

    monkeypatch.setattr(ComputeThreads, "share", checked)
    return made


def on(device: str, config: Mapping[str, Any]) -> Path:
    """Merge on a device, in a folder beside the one that the config names."""
    output = Path(config["output"]["path"]).with_name(f"on-{device}") / "merged"
    config = {
        **config,
        "output": {**config["output"], "path": str(output)},
        "compute": {**config["compute"], "device": device},
    }
    shardmerge.merge(config)
    return output


def assert_agree(gpu: PretendedCuda, config: Mapping[str, Any]) -> None:
    """The bytes are those of the CPU, and so is what the record says of the rounding."""
    there, here = on("cuda", config), on("cpu", config)
    files = [path.relative_to(here) for path in here.rglob("*") if path.suffix in (".safetensors", ".gguf")]
    assert files
    for file in files:
        assert (there / file).read_bytes() == (here / file).read_bytes(), file
    mine, its = (json.loads((of / "shardmerge.json").read_text()) for of in (there, here))
    assert mine.get("fidelity") == its.get("fidelity")
    assert gpu.operations > 0 and not gpu.registered


# --- families ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", slow_but(NAMES, *NAMES[::2]))
def test_every_family(name: str, gpu: PretendedCuda, tmp_path: Path) -> None:
    assert_agree(gpu, config_of(name, tmp_path / "out"))


def test_the_families_are_all_here(tmp_path: Path) -> None:
    plans = [shardmerge.plan(config_of(name, tmp_path / "out")) for name in NAMES]
    seen = {update.family for plan in plans for tensor, _ in plan.updates() for update in tensor.updates}
    assert seen == {name for name, family in FAMILIES.items() if family.is_of_adapter}


# --- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("base", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["LoRA", "DoRA, transposed"])
def test_dtypes(name: str, base: str, out: str, gpu: PretendedCuda, tmp_path: Path) -> None:
    """Wider and narrower output lies on other tiles' input."""
    assert_agree(gpu, config_of(name, tmp_path / "out", base, dtype=out))


@pytest.mark.parametrize("compute", ["float64", "bfloat16"])
def test_compute_dtypes(compute: str, gpu: PretendedCuda, tmp_path: Path) -> None:
    assert_agree(gpu, config_of("LoRA", tmp_path / "out", "bfloat16", compute=compute))


@pytest.mark.parametrize(("compute", "out"), [("float32", "bfloat16"), ("float64", "float16")])
def test_rounding_by_chance(compute: str, out: str, gpu: PretendedCuda, tmp_path: Path) -> None:
    config = config_of("LoRA", tmp_path / "out", dtype=out, compute=compute)
    config["output"] |= {"rounding": "stochastic", "seed": 5}
    config["compute"]["max_memory"] = least_memory(config)
    assert_agree(gpu, config)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_gguf(rounding: str, gpu: PretendedCuda, tmp_path: Path) -> None:
    """Blocks are made on the CPU, of what was rounded on the device."""
    base, modules = make_for_gguf("mistral", tmp_path / "base", tmp_path), {}
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.q_proj"
        rows, columns = stored(base)[f"{name}.weight"].shape
        modules[name] = (random(4, columns, seed=layer), random(rows, 4, seed=9))
    config = make_config(tmp_path / "out", base, [write_adapter(tmp_path / "adapter", modules)], dtype="bfloat16")
    config["output"] |= {"format": "gguf", "quantization": "q8_0", "rounding": rounding}
    assert_agree(gpu, config)


@pytest.mark.parametrize(("value", "base"), [(1e6, 1.0), (1.0, math.inf)])
def test_a_value_that_is_not_finite_is_told_as_on_the_cpu(
    value: float, base: float, gpu: PretendedCuda, tmp_path: Path
) -> None:
    w = torch.full((300, 40), 1.0)
    w[211, 7] = base
    b = torch.zeros(300, 2)
    b[211, 0] = value
    where = write_base(tmp_path / "base", [{"m.weight": w}])
    adapter = write_adapter(tmp_path / "adapter", {"m": (torch.eye(2, 40), b)})
    config = make_config(tmp_path / "out", where, [adapter], dtype="float16")
    told = []
    for device in ("cpu", "cuda"):
        with pytest.raises(shardmerge.ShardmergeError) as error:
            on(device, config)
        told.append(str(error.value).split(";")[0])
    assert told[0] == told[1] and "row 211" in told[0]
    assert gpu.ever_registered and not gpu.registered


# --- memory, streams and switches -------------------------------------------------------------------------------------


def test_buffers_are_registered_once_and_let_go(gpu: PretendedCuda, tmp_path: Path) -> None:
    config = {
        **config_of("LoRA", tmp_path / "out"),
        "output": {"path": str(tmp_path / "out"), "max_shard_size": "200KB"},
    }
    plan = shardmerge.plan(config)
    assert len(plan.shards) > 1
    assert_agree(gpu, config)
    assert len(gpu.ever_registered) == len(set(gpu.ever_registered)) == plan.memory.buffers
    assert len(gpu.streams) == WORKERS


def test_memory_that_cannot_be_registered_is_used_as_it_is(gpu: PretendedCuda, tmp_path: Path) -> None:
    gpu.answer = 2
    assert_agree(gpu, config_of("LoRA", tmp_path / "out"))
    assert not gpu.ever_registered and not gpu.error_waits


def test_both_threads_have_their_stream(gpu: PretendedCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()
    apply, together = FAMILIES["lora"].apply, threading.Barrier(WORKERS, timeout=60)

    def spy(tile: Tensor, *given: Any) -> None:
        assert isinstance(tile, OnDevice)
        if gpu.current.number not in seen:
            seen.add(gpu.current.number)
            together.wait()
        apply(tile, *given)

    monkeypatch.setattr(type(FAMILIES["lora"]), "apply", lambda self, *given: spy(*given))
    monkeypatch.setattr(tiling, "_SIZES", ((1 << 16, 1 << 13),))
    where = write_base(tmp_path / "base", [{"m.weight": random(2048, 256, seed=0)}])
    adapter = write_adapter(tmp_path / "adapter", {"m": (random(4, 256, seed=1), random(2048, 4, seed=2))})
    on("cuda", make_config(tmp_path / "out", where, [adapter]))
    assert seen == set(range(WORKERS))


def test_who_does_not_wait_is_found(gpu: PretendedCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaDevice, "on_stream", lambda self, number: torch.cuda.stream(self._streams[number]))
    monkeypatch.setattr(rounding, "is_finite", lambda values: True)  # as this asks for a number, it waits
    monkeypatch.setattr(tiling, "_SIZES", ((1 << 16, 1 << 13),))
    where = write_base(tmp_path / "base", [{"m.weight": random(2048, 256, seed=0)}])
    adapter = write_adapter(tmp_path / "adapter", {"m": (random(4, 256, seed=1), random(2048, 4, seed=2))})
    with pytest.raises(MisuseError, match=r"a tile counts as done|let go while"):
        on("cuda", make_config(tmp_path / "out", where, [adapter]))


def test_what_is_delivered_is_there_when_the_stream_is_left(gpu: PretendedCuda) -> None:
    device, target = CudaDevice(DEVICE, 1), torch.zeros(5)
    device.pin([target])
    with device.on_stream(0):
        made = device.staging(target).fill_(3)
        device.deliver(made, target)
        made.fill_(4)  # later than the copy
        assert not target.any()
    assert target.eq(3).all()
    with pytest.raises(ValueError, match="x"), device.on_stream(0):  # and when it fails
        device.deliver(device.staging(target).fill_(6), target)
        raise ValueError("x")
    assert target.eq(6).all()
    device.close()


def test_factors_are_done_before_another_stream_has_them(gpu: PretendedCuda, tmp_path: Path) -> None:
    base, adapter = files("LoRA", "bfloat16")
    plan = shardmerge.plan(make_config(tmp_path / "out", base, [adapter]))
    tensor = next(tensor for tensor, _ in plan.updates() if tensor.updates[0].family == "lora")
    device = CudaDevice(DEVICE, 2)
    readers = OpenReaders([file for adapter in plan.adapters for file in adapter.files])
    loader = LazyFactors(readers.get, device)
    factors = loader.begin(tensor.updates, [torch.float64] * len(tensor.updates))[id(tensor.updates[0])]
    with device.on_stream(0):
        a, twice = factors.whole("A"), factors.kept("twice", lambda: 2 * factors.whole("A"))
        own = a + a
        with gpu.entered(gpu.streams[1]):
            assert torch.equal((a + a).cpu(), twice.cpu())
            with pytest.raises(MisuseError, match="stream 1 takes what stream 0 may still be writing"):
                own.add_(a)
    readers.close()


def switches() -> list[Any]:
    return [torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision]  # type: ignore[attr-defined]


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch has the old switches only")
@pytest.mark.parametrize("before", ["tf32", "ieee", "none"])
def test_tf32_is_off_while_tiles_are_merged(
    before: str, gpu: PretendedCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    rounded = Sampler.after

    def spy(*given: Any) -> None:
        seen.append(switches())
        rounded(*given)

    monkeypatch.setattr(Sampler, "after", spy)
    matmul, at_first = torch.backends.cuda.matmul, switches()
    matmul.fp32_precision = before
    try:
        on("cuda", config_of("DoRA", tmp_path / "out"))
        assert seen and all(each == ["ieee", "ieee"] for each in seen)
        assert switches() == [before, at_first[1]] and at_first[1] == "tf32"
    finally:
        matmul.fp32_precision = at_first[0]


def test_the_old_switches_are_used_where_there_are_no_others(
    gpu: PretendedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Switches:
        allow_tf32 = True

    matmul, convolution = Switches(), Switches()
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    monkeypatch.setattr(torch.backends, "cudnn", convolution)
    with pytest.raises(ValueError, match="x"), CudaDevice(DEVICE, 1).in_full():
        assert not matmul.allow_tf32 and not convolution.allow_tf32
        raise ValueError("x")
    assert matmul.allow_tf32 and convolution.allow_tf32


def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    config = config_of("LoRA", tmp_path / "out")
    config["compute"]["device"] = f"cuda:{max(7, torch.cuda.device_count())}"
    with pytest.raises(shardmerge.PlanError, match="CUDA devices here") as planned:
        shardmerge.plan(config)
    with pytest.raises(shardmerge.PlanError) as merged:
        shardmerge.merge(config)
    assert planned.value.problems == merged.value.problems


# --- what the pretended device finds ----------------------------------------------------------------------------------


def test_the_pretended_device_is_strict(gpu: PretendedCuda) -> None:
    one, other = gpu.new_stream(), gpu.new_stream()
    host = torch.zeros(4)
    with pytest.raises(MisuseError, match="no stream of its own"):
        OnDevice(host, gpu) + 1
    with gpu.entered(one):
        there = torch.ones(4, device=DEVICE)
        assert torch.equal((there * torch.tensor(2.0)).cpu(), torch.full((4,), 2.0))
        with pytest.raises(MisuseError, match="of the CPU and of the device"):
            there + host
        with pytest.raises(MisuseError, match="not registered"):
            host.to(DEVICE, non_blocking=True)
        with pytest.raises(MisuseError, match="converted on the CPU"):
            host.to(DEVICE, torch.float64)
        gpu.register(host.data_ptr(), host.nbytes, 0)
        host.to(DEVICE, non_blocking=True)
        host.fill_(1)
        with pytest.raises(MisuseError, match="overwritten before"):
            one.synchronize()
        there.add_(1)
        with gpu.entered(other):
            with pytest.raises(MisuseError, match="may still be writing"):
                there + 1
            one.synchronize()
            assert (there + 1).sum().item() == 12


# --- how far a GPU may be from the CPU --------------------------------------------------------------------------------

U = 2.0**-24  # half a unit of float32's last place, relative
RANK, ALPHA, BLOCK = 8, 13, 32

#: Of a base's weight W and a module's factors, all in float64: W', and by how much a float32 merge may be off. A sum of
#: n products is off by n·u of the sum of their magnitudes, in whatever order they are added; so B A by r·u·|B||A|, and
#: s B A, W + s B A by a rounding each.
Judge = Callable[[Tensor, Mapping[str, Tensor]], tuple[Tensor, Tensor]]


def of_lora(w: Tensor, factor: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    a, b, s = factor["lora_A.weight"], factor["lora_B.weight"], ALPHA / RANK
    new = w + s * b @ a
    return new, U * ((RANK + 1) * s * b.abs() @ a.abs() + new.abs())


def of_dora(w: Tensor, factor: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """m V / ‖V‖: beside V's error, its length's, which is half that of the sum of squares, a root and two roundings."""
    v, error = of_lora(w, factor)
    length, m = v.norm(dim=1, keepdim=True), factor["lora_magnitude_vector"].view(-1, 1)
    new = m * v / length
    relative = (w.shape[1] / 2 + 4) * U + error.norm(dim=1, keepdim=True) / length
    return new, (m / length).abs() * error + new.abs() * relative


def of_oft(w: Tensor, factor: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """W Rᵀ, R = I + 2S + 2S² + 2S³ + S⁴: three products of b and four sums make R, and one of b W Rᵀ."""
    q = factor["oft_R.weight"]
    s = torch.zeros(len(q), BLOCK, BLOCK, dtype=w.dtype)
    rows, columns = torch.triu_indices(BLOCK, BLOCK, 1)
    s[:, rows, columns] = q
    s = s - s.transpose(1, 2)

    def turned(of: Tensor, s: Tensor) -> Tensor:
        r = torch.eye(BLOCK, dtype=w.dtype) + 2 * s + 2 * s @ s + 2 * s @ s @ s + s @ s @ s @ s
        return torch.einsum("onj,nij->oni", of.view(len(of), -1, BLOCK), r).reshape(of.shape)

    return turned(w, s), U * (4 * BLOCK + 6) * turned(w.abs(), s.abs())


JUDGES: dict[str, tuple[Callable[[], Any], Judge]] = {
    "LoRA": (_of("Lora", *TALL, r=RANK, lora_alpha=ALPHA), of_lora),
    "DoRA": (_of("Lora", *TALL, r=RANK, lora_alpha=ALPHA, use_dora=True), of_dora),
    "OFT": (_of("OFT", *TALL, r=0, oft_block_size=BLOCK), of_oft),
}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", JUDGES)
def test_how_far_it_may_be_from_the_cpu(method: str, dtype: str, device: str, tmp_path: Path) -> None:
    """Two float32 merges are each within the bound; that it is one, a merge in float64 shows without a GPU.

    For LoRA ‖error‖ / ‖Δ‖ is so at most 2⁻²³ ((r + 1) ‖|B||A|‖ / ‖B A‖ + ‖W'‖ / ‖Δ‖). In bfloat16, where both round
    the two sides of a tie, they are a unit apart, but seldom.
    """
    make, judge = JUDGES[method]
    case = write_case(tmp_path, make(), make=Tall, dtype=dtype, scale=0.05)
    config = make_config(tmp_path / "out", case.base, [case.adapter])
    config["compute"]["max_memory"] = least_memory(config)
    assert all(tensor.tiles > 1 for tensor, _ in shardmerge.plan(config).updates())
    if device == "cuda":
        other = stored(on("cuda", config))
    else:
        wide = {**config["compute"], "dtype": "float64", "max_memory": "auto"}
        other = stored(on("cpu", {**config, "output": {"path": str(tmp_path / "wide" / "out")}, "compute": wide}))
    ours, base, adapter = stored(on("cpu", config)), stored(case.base), stored(case.adapter)
    for name, mine in ours.items():
        module = name.removesuffix(".weight")
        if module not in TALL:
            assert torch.equal(mine.view(torch.uint8), other[name].view(torch.uint8)), name
            continue
        start = f"base_model.model.{module}."
        factors = {key.removeprefix(start): of.double() for key, of in adapter.items() if key.startswith(start)}
        new, bound = judge(base[name].double(), factors)
        error = (mine.double() - other[name].double()).abs()
        rounded = mine.double().abs() * 2.0**-7 if dtype == "bfloat16" else 0.0
        assert (error <= 2.001 * bound + rounded).all(), name
        assert ((mine.double() - new).abs() <= 1.001 * bound + rounded).all(), name
        if dtype == "bfloat16":
            assert (error > 0).double().mean() < 0.01
