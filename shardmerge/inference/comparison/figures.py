"""Figures for the distance between a merged model and base + adapter, and limits for it.

Both see the same tokens, so that positions correspond. At every position, with distributions over the vocabulary P of
base + adapter, Q of the merged model and P₀ of the base alone:

- KL(P‖Q) = Σ P (log P − log Q), in nats. It is compared with KL(P‖P₀), the whole effect of the adapter.
- *effect*: 1 + Σ Cov_P(log Q − log P, log P − log P₀) / Σ Var_P(log P − log P₀), sums over all positions: the share of
  the adapter's effect that the merged model has. Rounding noise hardly changes it; a wrong scaling does.

Weights that are rounded to 16 bits differ slightly from W + ΔW, and so do logits. Where two tokens are almost equally
likely, the texts may part. The models still count as the same if both measures are within `LIMITS`. Without rounding to
16 bits, the errors of float32 are far below those limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from shardmerge.reporting.text import labelled, table
from shardmerge.spec.notices import Warned

#: A mean KL below this is not a difference, whatever the adapter does: it takes a million tokens to see one.
INVISIBLE = 1e-6
#: An adapter whose own KL is below this has hardly any effect on the prompts.
HARDLY = 1e-4
#: Positions in a batch; a row of the vocabulary in float64 takes a megabyte.
_ROWS = 16
_LEAST = -1e4


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits within which two models count as the same."""

    #: The merged model's KL over the adapter's own.
    share: float
    #: How far the effect may be from 1.
    effect: float
    #: Texts may part where base + adapter prefers its own token by at most so many nats.
    tie: float


#: By whether anything was rounded to 16 bits. A correct merge in bfloat16 has a share of 1e-5 to 1e-3 if the update is
#: well above bfloat16's resolution, and 0.01 with an effect of 0.94 if a quarter of its smallest updates are lost.
LIMITS = {True: Limits(share=0.05, effect=0.1, tie=0.25), False: Limits(share=1e-4, effect=0.01, tie=1e-3)}


@dataclass(frozen=True, slots=True)
class Reference:
    """An answer of base + adapter: the tokens of prompt and greedy answer, (n), and logits on them, (k, vocabulary).

    ``asked`` is the number of the prompt's tokens. The logits are of the k positions before the last.
    """

    prompt: str
    tokens: Tensor
    asked: int
    logits: Tensor
    base_logits: Tensor


@dataclass(slots=True)
class Sums:
    """Sums over positions. Variances and covariances are under P."""

    positions: int = 0
    kl: float = 0.0
    largest_kl: float = 0.0
    adapter_kl: float = 0.0
    covariance: float = 0.0
    variance: float = 0.0
    agreed: int = 0
    largest: float = 0.0
    squares: float = 0.0

    def add(self, other: Sums) -> None:
        for name in self.__slots__:
            mine, its = getattr(self, name), getattr(other, name)
            setattr(self, name, max(mine, its) if name.startswith("largest") else mine + its)

    def figures(self) -> dict[str, Any]:
        """Means, shares and maxima; None where there is nothing to divide by."""
        count = max(self.positions, 1)
        return {
            "positions": self.positions,
            "kl": self.kl / count,
            "largest_kl": self.largest_kl,
            "adapter_kl": self.adapter_kl / count,
            "kl_share": self.kl / self.adapter_kl if self.adapter_kl > 0 else None,
            "effect": 1 + self.covariance / self.variance if self.variance > 0 else None,
            "top1_agreement": self.agreed / count,
            "largest_logit_difference": self.largest,
            "logit_spread": (self.squares / count) ** 0.5,
        }


def measure(reference: Reference, logits: Tensor) -> Sums:
    """Compare logits (k, vocabulary) with the reference's."""
    sums = Sums()
    for start in range(0, len(logits), _ROWS):
        of = slice(start, start + _ROWS)
        sums.add(_measure(reference.logits[of].double(), logits[of].double(), reference.base_logits[of].double()))
    return sums


def _measure(wanted: Tensor, found: Tensor, base: Tensor) -> Sums:
    # A token that a model excludes with -inf is excluded in all three.
    log_p, log_q, log_base = (torch.log_softmax(of, -1).clamp(min=_LEAST) for of in (wanted, found, base))
    p = log_p.exp()
    off, effect = log_q - log_p, log_p - log_base
    kl, adapter_kl = -(p * off).sum(-1), (p * effect).sum(-1)
    effect = effect - adapter_kl.unsqueeze(-1)
    return Sums(
        positions=len(wanted),
        kl=float(kl.sum().clamp(min=0)),
        largest_kl=float(kl.max().clamp(min=0)),
        adapter_kl=float(adapter_kl.sum().clamp(min=0)),
        covariance=float((p * off * effect).sum()),
        variance=float((p * effect * effect).sum()),
        agreed=int((wanted.argmax(-1) == found.argmax(-1)).sum()),
        largest=float((found - wanted).abs().nan_to_num(0.0, 0.0).max()),
        squares=float(log_p.var(-1).sum()),
    )


@dataclass(frozen=True, slots=True)
class Answer:
    """One prompt. ``parts_at`` counts the answer's tokens from 0; None where both texts are the same.

    ``gap``: by how many nats base + adapter prefer their token to the merged model's, there.
    """

    prompt: str
    expected: str
    found: str
    parts_at: int | None
    gap: float | None
    figures: dict[str, Any]


def parting(reference: Reference, tokens: Tensor) -> tuple[int | None, float | None]:
    """The position where two token sequences (n) part, counted from the prompt's end, and the gap there."""
    mine, its = reference.tokens.tolist(), tokens.tolist()
    if mine == its:
        return None, None
    # Both have the same limit, and the end of an answer is a token too, so none is a prefix of the other.
    at = next(i for i, (one, other) in enumerate(zip(mine, its, strict=False)) if one != other)
    # The last row of logits is for the last token.
    row = reference.logits[at - len(mine) + len(reference.logits)]
    return at - reference.asked, float(row[mine[at]] - row[its[at]])


@dataclass(frozen=True, slots=True)
class Comparison:
    """The comparison of a merged model with base + adapter.

    Both computed in ``dtype``. ``rounded`` is True where that, or the dtype of the merged weights, has 16 bits.
    """

    output: str
    base: str
    adapters: tuple[str, ...]
    dtype: str
    rounded: bool
    answers: tuple[Answer, ...]
    figures: dict[str, Any]

    @property
    def differences(self) -> list[str]:
        """Every reason why the two count as different."""
        limits, of = LIMITS[self.rounded], self.figures
        found = [
            f"the text on {answer.prompt!r} parts after {answer.parts_at} tokens, where base + adapter prefer their "
            f"own by {answer.gap:.3g} nats; up to {limits.tie:g} is a tie"
            for answer in self.answers
            if answer.gap is not None and answer.gap > limits.tie
        ]
        if of["kl"] <= INVISIBLE:
            return found
        share, effect = of["kl_share"], of["effect"]
        if share is None or effect is None:
            return [*found, f"the adapter changes nothing on these prompts, but the merge does (KL {of['kl']:.3g})"]
        if share > limits.share:
            found.append(
                f"the KL divergence from base + adapter is {share:.3g} of what the adapter itself makes; expected up "
                f"to {limits.share:g}"
            )
        if abs(effect - 1) > limits.effect:
            found.append(
                f"the merged model has {effect:.1%} of the adapter's effect; expected 100% within {limits.effect:.0%}"
            )
        return found

    @property
    def same(self) -> bool:
        return not self.differences

    @property
    def notes(self) -> list[str]:
        """Remarks on how far the comparison can be relied on."""
        if self.figures["adapter_kl"] >= HARDLY:
            return []
        return [Warned("the adapter hardly shows on these prompts; give some that it was trained for with prompts=")]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "same": self.same, "differences": self.differences, "notes": self.notes}


def describe(comparison: Comparison) -> str:
    """The text of a comparison."""
    of, answers = comparison.figures, comparison.answers
    lines = [
        f"{comparison.output}: merged against base + adapter, both in {comparison.dtype}, {of['positions']} positions",
        "",
        table([_HEAD, *(_row(answer.prompt, _text(answer), answer.figures) for answer in answers)], right=range(2, 6)),
        "",
    ]
    alike = sum(answer.parts_at is None for answer in answers)
    largest, spread, effect = of["largest_logit_difference"], of["logit_spread"], of["effect"]
    lines += [
        f"the same text on {alike} of {len(answers)} prompts; top-1 agrees at {of['top1_agreement']:.2%} of positions",
        f"largest logit difference {largest:.3g}, where logits spread by {spread:.3g}",
        _closeness(of),
        *([] if effect is None else [f"{effect:.2%} of the adapter's effect"]),
        *map(labelled, comparison.notes),
        "the same" if comparison.same else "DIFFERENT",
    ]
    return "\n".join(lines)


def _closeness(of: dict[str, Any]) -> str:
    if of["kl"] <= 0:
        return f"no KL divergence at all, where the base alone has {of['adapter_kl']:.3g}"
    times = of["adapter_kl"] / of["kl"]
    shown = f"{times:,.0f}" if times >= 10 else f"{times:.2g}"
    return f"KL {of['kl']:.3g}, that of the base alone is {of['adapter_kl']:.3g}: {shown} times as far"


def difference(comparison: Comparison) -> str:
    """The text of an error: why the two are different, and what to run next."""
    lines = "\n".join(f"  - {text}" for text in comparison.differences)
    return (
        f"{comparison.output} does not answer as base + adapter:\n{lines}\n"
        "`shardmerge verify` checks whether the merge did as its config says. output.dtype: float32 keeps what "
        "rounding to 16 bits loses of a small update"
    )


_HEAD = ("prompt", "text", "KL", "adapter's KL", "top-1", "logits")
_LONGEST = 40


def _row(prompt: str, text: str, of: dict[str, Any]) -> tuple[str, ...]:
    shown = " ".join(prompt.split())
    shown = shown if len(shown) <= _LONGEST else shown[: _LONGEST - 1] + "…"
    numbers = (f"{of['kl']:.3g}", f"{of['adapter_kl']:.3g}", f"{of['top1_agreement']:.1%}")
    return (shown, text, *numbers, f"{of['largest_logit_difference']:.3g}")


def _text(answer: Answer) -> str:
    return "same" if answer.parts_at is None else f"parts at {answer.parts_at} (gap {answer.gap:.2g})"


def total(sums: Sequence[Sums]) -> dict[str, Any]:
    """The figures over all prompts."""
    whole = Sums()
    for each in sums:
        whole.add(each)
    return whole.figures()
