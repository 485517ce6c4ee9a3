"""Adapters of any family on a small network, and what PEFT makes of them: the oracle of the families' tests.

The network is not a model of transformers, so it is quickly made. It has a layer of every kind that methods know. Sizes
are odd on purpose: a swapped orientation does not fit.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import shardmerge
from tests.support.peft_oracle import assert_same_bits, least_memory, make_config, merge_to, stored

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Net(nn.Module):
    """Layers of many kinds; ``forward`` takes tokens (batch, length)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, 24)
        self.wide = nn.Linear(24, 56)
        self.square = nn.Linear(56, 56, bias=False)
        self.narrow = nn.Linear(56, 24)
        self.norm = nn.LayerNorm(24)
        self.conv1 = nn.Conv1d(24, 18, 3, padding=1)
        self.conv2 = nn.Conv2d(2, 6, (3, 5), padding=(1, 2))
        self.head = nn.Linear(54, 37)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        hidden = self.norm(hidden + self.narrow(torch.tanh(self.square(torch.relu(self.wide(hidden))))))
        seen = torch.tanh(self.conv1(hidden.transpose(1, 2)))  # (batch, 18, length)
        seen = self.conv2(seen.view(len(seen), 2, 9, -1)).flatten(1, 2)  # (batch, 54, length)
        return torch.as_tensor(self.head(seen.transpose(1, 2)))


class Tall(nn.Module):
    """Two matrices and a convolution that are worked on in several tiles where memory is little."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, 96)
        self.tall = nn.Linear(96, 768)
        self.wide = nn.Linear(768, 96)
        self.conv = nn.Conv2d(4, 240, 3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.wide(torch.tanh(self.tall(self.embed(tokens))))  # (batch, length, 96)
        return torch.as_tensor(self.conv(hidden.transpose(1, 2).reshape(len(hidden), 4, 24, -1)))


class Swapped(nn.Module):
    """GPT-2's Conv1D, whose W is (in, out); large enough for several tiles."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.embed = nn.Embedding(37, 96)
        self.wide = Conv1D(768, 96)
        self.narrow = Conv1D(96, 768)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.as_tensor(self.narrow(torch.tanh(self.wide(self.embed(tokens)))))


TOKENS = torch.arange(2 * 7).view(2, 7) % 37
LINEARS = ("wide", "square", "narrow", "head")


@dataclass(frozen=True)
class Case:
    """A base and an adapter on disk, and the network they are of."""

    base: Path
    adapter: Path
    net: nn.Module


def write_case(
    folder: Path,
    config: Any,
    *,
    dtype: str = "float32",
    make: Callable[[], nn.Module] = Net,
    scale: float = 0.2,
    prepare: Callable[[str, Tensor], None] | None = None,
    adapter_dtype: str | None = None,
) -> Case:
    """Make the network and the adapter from fixed seeds, randomise all that is trained, and save both.

    ``prepare`` may change a trained tensor in place, by its name, after it was randomised.
    """
    from peft import get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = make().to(DTYPES[dtype]).eval()
        base, adapter = folder / "base", folder / "adapter"
        base.mkdir(parents=True)
        save_file({name: tensor.clone() for name, tensor in net.state_dict().items()}, base / "model.safetensors")
        (base / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
        model = get_peft_model(copy.deepcopy(net), config)
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                with torch.no_grad():
                    parameter.add_(torch.randn_like(parameter), alpha=scale)
                    if prepare is not None:
                        prepare(name, parameter)
        model.save_pretrained(adapter)
    if adapter_dtype is not None:
        file = adapter / "adapter_model.safetensors"
        save_file({name: tensor.to(DTYPES[adapter_dtype]) for name, tensor in load_file(file).items()}, file)
    return Case(base, adapter, net)


def unmerged(case: Case) -> Any:
    """Base + adapter, as PEFT loads them."""
    from peft import PeftModel

    return PeftModel.from_pretrained(copy.deepcopy(case.net), case.adapter).eval()


def merged_by_peft(case: Case) -> Mapping[str, Tensor]:
    """What PEFT's default merge makes of the weights."""
    state: Mapping[str, Tensor] = unmerged(case).merge_and_unload().state_dict()
    return state


def merged_by_us(case: Case, output: Path, **options: Any) -> dict[str, Tensor]:
    """What shardmerge writes."""
    merge_to(output, case.base, case.adapter, **options)
    return stored(output)


def assert_equals_peft(case: Case, output: Path, **options: Any) -> dict[str, Tensor]:
    """Bit for bit what PEFT's merge makes, and not the base."""
    ours = merged_by_us(case, output, **options)
    assert_same_bits(ours, dict(merged_by_peft(case)))
    before = case.net.state_dict()
    assert any(not torch.equal(ours[name], before[name]) for name in before), "the adapter changes nothing"
    return ours


def assert_weights_equal_peft(case: Case, output: Path) -> dict[str, Tensor]:
    """Bit for bit what PEFT's merge makes of matrices; of biases within float32's rounding of the exact value.

    Where PEFT multiplies a bias by a matrix of mostly zeros, the processor decides whether the few products that are
    left meet in one fused multiply-add or are rounded one by one: the same CPU may round a block otherwise than the
    whole.
    """
    ours, theirs = merged_by_us(case, output), dict(merged_by_peft(case))
    is_bias = {name: tensor.dim() == 1 for name, tensor in theirs.items()}
    assert_same_bits(
        {name: tensor for name, tensor in ours.items() if not is_bias[name]},
        {name: tensor for name, tensor in theirs.items() if not is_bias[name]},
    )
    errors = relative_errors(case, ours, theirs, exact_weights(case))
    assert errors, "the adapter changes nothing"
    assert all(mine <= 2**-22 for name, (mine, _) in errors.items() if is_bias[name]), errors
    return ours


def relative_errors(
    case: Case, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> dict[str, tuple[float, float]]:
    """‖error‖ / ‖Δ‖ of both, against weights known in float64, for every tensor that changes."""
    found = {}
    for name, before in case.net.state_dict().items():
        change = (exact[name].double() - before.double()).norm()
        if change > 0:
            errors = [float((of[name].double() - exact[name].double()).norm() / change) for of in (ours, theirs)]
            found[name] = (errors[0], errors[1])
    return found


def exact_weights(case: Case) -> dict[str, Tensor]:
    """PEFT's merge with everything in float64: where PEFT itself rounds more than once, the judge of both."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(copy.deepcopy(case.net).double(), case.adapter).double()
    return {name: tensor.double() for name, tensor in model.merge_and_unload().state_dict().items()}


def assert_no_worse_than_peft(
    case: Case, output: Path, *, exact: Callable[[Case], Mapping[str, Tensor]] = exact_weights, **options: Any
) -> dict[str, Tensor]:
    """Our error against float64 is no larger than PEFT's, tensor by tensor, and what does not change keeps its bits."""
    ours, theirs = merged_by_us(case, output, **options), merged_by_peft(case)
    errors = relative_errors(case, ours, theirs, exact(case))
    assert errors, "the adapter changes nothing"
    for name, (mine, its) in errors.items():
        assert mine <= its, f"{name}: our error is {mine:.3g} of Δ, PEFT's {its:.3g}"
    unchanged = {name: tensor for name, tensor in case.net.state_dict().items() if name not in errors}
    assert_same_bits({name: ours[name] for name in unchanged}, unchanged)
    return ours


def assert_same_outputs(case: Case, ours: Mapping[str, Tensor], tolerance: float = 1e-4) -> None:
    """The merged network answers what base + adapter answer, and the base alone does not."""
    merged = copy.deepcopy(case.net).float()
    merged.load_state_dict({name: tensor.float() for name, tensor in ours.items()})
    with torch.inference_mode():
        wanted = unmerged(case).float()(TOKENS)
        size = wanted.abs().max()
        assert (merged(TOKENS) - wanted).abs().max() <= tolerance * size
        assert (case.net.float()(TOKENS) - wanted).abs().max() > 20 * tolerance * size


def assert_tiles_agree(case: Case, output: Path, whole: Mapping[str, Tensor], at_least: int = 2) -> None:
    """In as little memory as the plan takes, some tensor has several tiles, and the bits are the same."""
    config = make_config(output, case.base, [case.adapter])
    config["compute"]["max_memory"] = least_memory(config)
    plan = shardmerge.plan(config)
    assert max(tensor.tiles for tensor, _ in plan.updates()) >= at_least, "every tensor is one tile"
    shardmerge.merge(config)
    assert_same_bits(stored(output), whole)


def change_tensors(case: Case, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Rewrite the adapter's file."""
    file = case.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def refusal(case: Case, **changes: Any) -> str:
    """What the plan says of an adapter whose config was changed; fails if it accepts it."""
    file = case.adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    try:
        shardmerge.plan(make_config(case.base.with_name("merged"), case.base, [case.adapter]))
    except shardmerge.ShardmergeError as error:
        return str(error)
    raise AssertionError("the plan accepts it")


class Experts(nn.Module):
    """Four experts, (E, out, in) or, transposed, (E, in, out)."""

    def __init__(self, transposed: bool, square: bool = False) -> None:
        super().__init__()
        self.is_transposed = transposed
        inner, hidden = (40, 24) if not square else (24, 24)
        shapes = [(inner, hidden), (hidden, inner)]
        up, down = [shape[::-1] if transposed else shape for shape in shapes]
        self.up_proj = nn.Parameter(torch.randn(4, *up) * 0.1)
        self.down_proj = nn.Parameter(torch.randn(4, *down) * 0.1)

    def forward(self, hidden: Tensor) -> Tensor:
        up: Tensor = self.up_proj
        down: Tensor = self.down_proj
        if not self.is_transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        return torch.einsum("bli,eio,eoj->blj", hidden, up, down)


class Mixture(nn.Module):
    def __init__(self, transposed: bool = False, square: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, 24)
        self.experts = Experts(transposed, square)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.as_tensor(self.experts(self.embed(tokens)))
