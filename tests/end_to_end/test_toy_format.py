"""A stored format in one file: merged from and into, verified, resumed after SIGKILL; the seam of the codecs."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import shardmerge
from shardmerge import NonFiniteError, PlanError
from shardmerge.codecs.codec import Codec
from shardmerge.codecs.registry import CODECS
from shardmerge.execution import tiles
from shardmerge.verification.decoders import DECODERS
from tests.support.builders import contents, run_python
from tests.support.peft_oracle import least_memory, make_config, random, write_adapter, write_base
from tests.support.tampering import forge_checksums, wrong
from tests.support.toy_codec import ROWS, SCALE, TOYS, VALUES, second_decoder

SHAPE = (300, 96)  # the last of its ten blocks is short
RANK, ALPHA = 4, 3.0
each = pytest.mark.parametrize("kind", [codec.name for codec in TOYS])


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    for codec in TOYS:
        monkeypatch.setitem(CODECS, codec.name, codec)
        monkeypatch.setitem(DECODERS, codec.name, second_decoder)


def toy(values: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Codes and scales, by the format's definition in float64."""
    blocks = [values] if kind == "toy-one-scale" else list(torch.split(values, ROWS))
    scales = torch.stack([(block.abs().max().float() / 127).clamp(min=2.0**-120) for block in blocks])
    codes = [(block.double() / scale.double()).round() for block, scale in zip(blocks, scales, strict=True)]
    return torch.cat(codes).to(torch.int8), scales


def values_of(codes: Tensor, scales: Tensor) -> Tensor:
    """Exact values, in float64."""
    each_row = scales.double().repeat_interleave(ROWS)[: len(codes)] if len(scales) > 1 else scales.double()
    return (codes.double() * each_row.view(-1, 1)).float().double()


def step_of(values: Tensor, kind: str) -> Tensor:
    """The distance between two levels, of each row."""
    _, scales = toy(values, kind)
    return (scales.repeat_interleave(ROWS)[: len(values)] if len(scales) > 1 else scales).double().view(-1, 1)


class Scene:
    """``m`` and ``o`` are stored in the format, ``m``'s scales in another shard than its codes; ``n`` is plain."""

    def __init__(self, folder: Path, kind: str = "toy", shape: tuple[int, int] = SHAPE) -> None:
        self.folder, self.kind = folder, kind
        rows = torch.logspace(-2, 0, shape[0])[:, None]
        m, o = (toy(random(*shape, seed=seed) * rows, kind) for seed in (1, 2))
        self.codes, self.scales = m
        self.other = {f"o.weight{VALUES}": o[0], f"o.weight{SCALE}": o[1]}
        self.plain = {"n.weight": random(24, 16, seed=3)}
        first = {f"m.weight{VALUES}": m[0], **self.plain}
        second = {"head.weight": random(8, 16, seed=4), f"m.weight{SCALE}": m[1], **self.other}
        quantised: dict[str, Any] = {"quantization_config": {"quant_method": kind}}
        self.base = write_base(folder / "base", [first, second], **quantised)
        self.a, self.b = random(RANK, shape[1], seed=5), random(shape[0], RANK, seed=6, scale=0.05)
        self.adapter = write_adapter(folder / "adapter", {"m": (self.a, self.b)}, ALPHA)

    @property
    def merged(self) -> Tensor:
        """W + s · B A in float64."""
        delta = (self.b.double() @ self.a.double()) * (ALPHA / RANK)
        return values_of(self.codes, self.scales) + delta

    def config(self, output: str = "out", **options: Any) -> dict[str, Any]:
        config = make_config(self.folder / output, self.base, [self.adapter], **options)
        config["output"]["quantized"] = "dense" if "dtype" in options else "same"
        return config


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def order_of(file: Path) -> list[str]:
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    header.pop("__metadata__", None)
    return sorted(header, key=lambda name: header[name]["data_offsets"])


def assert_merged(scene: Scene, found: Mapping[str, Tensor]) -> None:
    codes, scales = found[f"m.weight{VALUES}"], found[f"m.weight{SCALE}"]
    step = step_of(scene.merged, scene.kind)
    assert bool(((values_of(codes, scales) - scene.merged).abs() <= step * (0.5 + 1e-3)).all())
    wanted_codes, wanted_scales = toy(scene.merged.float(), scene.kind)
    torch.testing.assert_close(scales, wanted_scales, rtol=1e-5, atol=0)
    # Where float32 and float64 fall on either side of a tie, the codes are neighbours.
    assert int((codes.int() - wanted_codes.int()).abs().max()) <= 1
    assert float((codes != wanted_codes).double().mean()) < 1e-3


@each
def test_merged_from_the_format_and_into_it(tmp_path: Path, kind: str) -> None:
    scene = Scene(tmp_path, kind)
    report = shardmerge.merge(scene.config())
    found = stored(tmp_path / "out")
    assert_merged(scene, found)
    assert found.keys() == stored(scene.base).keys() and report.targets == 1
    for name, tensor in {**scene.other, **scene.plain}.items():
        assert torch.equal(found[name], tensor)  # what no adapter touches keeps its bytes
    # The scales have followed their weight into its shard, and the index says so.
    first = tmp_path / "out" / "model-00001-of-00002.safetensors"
    names = order_of(first)
    assert names[names.index(f"m.weight{VALUES}") + 1] == f"m.weight{SCALE}"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            assert name in opened.keys()  # noqa: SIM118


@each
def test_what_was_merged_is_verified(tmp_path: Path, kind: str) -> None:
    scene = Scene(tmp_path, kind)
    shardmerge.merge(scene.config())
    for rows in (16, None):
        report = shardmerge.verify(tmp_path / "out", rows=rows)
        assert report.ok and report.complete and report.touched == 1, report.problems
        assert 0 < report.worst <= 1


@each
@pytest.mark.parametrize("part", ["code", "scale", "untouched"])
def test_verify_finds_what_was_changed(tmp_path: Path, kind: str, part: str) -> None:
    scene = Scene(tmp_path, kind)
    shardmerge.merge(scene.config())
    name, at, kind_of_problem = {
        "code": (f"m.weight{VALUES}", 96 * 37 + 5, "touched"),
        "scale": (f"m.weight{SCALE}", 2, "touched"),
        "untouched": (f"o.weight{SCALE}", 1, "untouched"),
    }[part]
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            if name not in opened.keys():  # noqa: SIM118
                continue
        content = bytearray(file.read_bytes())
        size = int.from_bytes(content[:8], "little")
        start = json.loads(content[8 : 8 + size])[name]["data_offsets"][0]
        content[8 + size + start + at] ^= 0x10
        file.write_bytes(content)
    forge_checksums(tmp_path / "out")
    assert kind_of_problem in {problem.kind for problem in wrong(tmp_path / "out", rows=None).problems}


@each
def test_the_same_bytes_in_little_memory(tmp_path: Path, kind: str) -> None:
    """There the weight takes many tiles, and its scales are made in many steps."""
    scene = Scene(tmp_path, kind, (2500, 320))
    shardmerge.merge(scene.config())
    little = scene.config("little", max_memory=least_memory(scene.config("x")))
    (tensor,) = (tensor for tensor, _ in shardmerge.plan(little).updates())
    assert tensor.tiles > 4
    shardmerge.merge(little)
    assert stored(tmp_path / "out").keys() == stored(tmp_path / "little").keys()
    for name, found in stored(tmp_path / "little").items():
        assert torch.equal(found, stored(tmp_path / "out")[name]), name
    shardmerge.verify(tmp_path / "little", rows=None).raise_for_status()


@each
def test_another_dtype_is_decode_of_one_codec_and_encode_of_another(tmp_path: Path, kind: str) -> None:
    scene = Scene(tmp_path, kind)
    shardmerge.merge(scene.config(dtype="bfloat16"))
    found = stored(tmp_path / "out")
    assert found.keys() == {"m.weight", "n.weight", "o.weight", "head.weight"}
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    error = (found["m.weight"].double() - scene.merged).abs()
    assert bool((error <= scene.merged.abs() * (2.0**-8 + 2.0**-20) + 1e-6).all())
    other = values_of(*scene.other.values()).to(torch.bfloat16)
    assert torch.equal(found["o.weight"], other)
    assert shardmerge.verify(tmp_path / "out", rows=None).ok


_RUN = """
import json, os, signal, sys
from tests.support import toy_codec
toy_codec.register()
import shardmerge
config, kill = json.loads(sys.argv[1]), sys.argv[2] == "kill"
seen = 0
def progress(at):
    global seen
    if at.shard_number == 2 and at.doing == "merging":
        seen += 1
        if kill and seen > 3:
            os.kill(os.getpid(), signal.SIGKILL)
print(json.dumps(shardmerge.merge(config, progress=progress).shards_reused))
"""
_VERIFY = """
import sys
from tests.support import toy_codec
toy_codec.register()
from shardmerge.cli.main import main
sys.argv = ["shardmerge", "verify", sys.argv[1]]
main()
"""


def test_resumed_after_a_kill(tmp_path: Path) -> None:
    """A process of its own is killed while the second shard is half written, with a weight of the format in it."""
    scene = Scene(tmp_path, shape=(2500, 320))
    scene.adapter = write_adapter(
        tmp_path / "both", {"m": (scene.a, scene.b), "o": (scene.a, scene.b.flip(0).contiguous())}, ALPHA
    )
    least = least_memory(scene.config("x"))
    shardmerge.merge(scene.config("clean", max_memory=least))
    config = json.dumps(scene.config(max_memory=least))
    killed = run_python("-c", _RUN, config, "kill")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    resumed = run_python("-c", _RUN, config, "")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout.splitlines()[-1]) == 1  # the first shard was kept
    names = [file.name for file in (tmp_path / "clean").glob("*.safetensors*")]
    assert len(names) == 3
    assert all(contents(tmp_path / "out")[name] == contents(tmp_path / "clean")[name] for name in names)
    proved = run_python("-c", _VERIFY, tmp_path / "out")
    assert proved.returncode == 0 and "verified in" in proved.stdout, proved.stdout + proved.stderr


def test_rounding_that_the_format_cannot_do_is_refused(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    config = scene.config()
    config["output"]["rounding"] = "stochastic"
    with pytest.raises(PlanError, match=r"m\.weight is stored as toy, which is rounded to nearest only"):
        shardmerge.plan(config)


def test_a_weight_without_its_scale_is_refused(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    file = scene.base / "model-00002-of-00002.safetensors"
    tensors = load_file(file)
    del tensors[f"m.weight{SCALE}"]
    write_base(scene.base, [load_file(scene.base / "model-00001-of-00002.safetensors"), tensors], **quantised("toy"))
    with pytest.raises(PlanError, match=r"m\.weight_q has no m\.weight_scale of F32 \[10\]"):
        shardmerge.plan(scene.config())


def quantised(kind: str) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": kind}}


def test_names_alone_make_no_weight(tmp_path: Path) -> None:
    """Without the config, the same tensors are numbers like any others, and the adapter has no weight to go to."""
    scene = Scene(tmp_path)
    (scene.base / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(PlanError, match=r"m\.weight|module m"):
        shardmerge.plan(scene.config())


def test_a_value_that_the_format_cannot_hold_stops_the_merge(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    write_adapter(scene.adapter, {"m": (scene.a * 1e16, scene.b * 1e16)}, ALPHA)
    with pytest.raises(NonFiniteError, match=r"m\.weight, row \d+, column \d+: the merged value is .* more than toy"):
        shardmerge.merge(scene.config())
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_scale_that_is_no_number_is_named(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    file = scene.base / "model-00002-of-00002.safetensors"
    tensors = load_file(file)
    tensors[f"m.weight{SCALE}"][7] = float("nan")
    write_base(scene.base, [load_file(scene.base / "model-00001-of-00002.safetensors"), tensors], **quantised("toy"))
    with pytest.raises(NonFiniteError, match=r"m\.weight_scale holds nan at \[7\]"):
        shardmerge.merge(scene.config())


def test_the_whole_tensor_is_seen_before_the_first_tile_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tmp_path, "toy-one-scale", (2500, 320))
    codec: Codec = CODECS["toy-one-scale"]
    calls: list[str] = []
    for name in ("prepass", "encode"):
        real = getattr(type(codec), name)

        def noted(self: Codec, *args: Any, name: str = name, real: Any = real) -> Any:
            calls.append(name)
            return real(self, *args)

        monkeypatch.setattr(type(codec), name, noted)
    shardmerge.merge(scene.config(max_memory=least_memory(scene.config("x"))))
    count = calls.count("prepass")
    assert count > 4 and calls == ["prepass"] * count + ["encode"] * count


def test_the_engine_names_no_format() -> None:
    source = Path(str(tiles.__file__)).parent
    text = "\n".join(file.read_text(encoding="utf-8") for file in sorted(source.glob("*.py")))
    assert "gguf" not in text.lower() and "ggml" not in text.lower() and "Q8_0" not in text
