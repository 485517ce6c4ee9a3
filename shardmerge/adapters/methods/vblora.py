"""VB-LoRA: W' = W + B A, where A and B are put together from the vectors of a bank that all modules share.

W is (out, in), the bank (h, b): h vectors of length b, which divides in and out. Logits (r, in / b, h) make A: of the
h logits of every piece the k largest count, their softmax weighs their vectors, and the sum is the piece, so that A
is (r, in). Logits (out / b, r, h) make the columns of B, (out, r), in the same way.
Li et al. 2024, arXiv:2405.15179. Source: peft/tuners/vblora/layer.py and model.py, 0.21.
The bits are those of PEFT's merge.

With ``save_only_topk_weights`` the file has, in place of logits, the numbers of the k vectors and the first k - 1
weights; the last is what they lack to one. Where rounding makes them more than one it is zero here; PEFT takes a
negative number's logarithm, and what it makes of the weight is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardmerge.adapters.claims import Claims, ModuleUpdate
from shardmerge.adapters.formats.checks import FLAG, RANK
from shardmerge.adapters.formats.peft_method import Context, Module, PeftFamily, key_of
from shardmerge.adapters.lazy_torch import Tensor, torch
from shardmerge.adapters.methods.base import Factors, add_scaled, all_misshaped, check_indices, misshaped, oriented
from shardmerge.spec.updates import Parameter, Settings, Update, Window

_LOGITS, _INDICES, _WEIGHTS = ("logits_A", "logits_B"), ("indices_A", "indices_B"), ("weights_A", "weights_B")


@dataclass(frozen=True, slots=True)
class VbLoraSettings(Settings):
    """k."""

    topk: int


class VbLora(PeftFamily):
    name = "vblora"
    builds = True
    whole_numbers = frozenset(_INDICES)
    neutral_if_zero = frozenset({"bank"})
    by_column_windows = True
    adds = True
    peft_type = "VBLORA"
    title = "VB-LoRA"
    updates = "matrices"
    paper = "arXiv:2405.15179"
    roles = {
        "vblora_logits_A": "logits_A?",
        "vblora_logits_B": "logits_B?",
        "vblora_logits_A_topk_indices": "indices_A?",
        "vblora_logits_B_topk_indices": "indices_B?",
        "vblora_logits_A_topk_weights": "weights_A?",
        "vblora_logits_B_topk_weights": "weights_B?",
    }
    kept_once = ("vblora_vector_bank",)
    shared_roles = {"vblora_vector_bank": "bank"}
    settings = {
        "r": RANK,
        "num_vectors": RANK,
        "vector_length": RANK,
        "topk": RANK,
        "save_only_topk_weights": FLAG,
        "fan_in_fan_out": FLAG,
    }
    inert = frozenset({"init_logits_std", "init_vector_bank_bound", "vblora_dropout"})

    def claim_module(self, claims: Claims, module: Module, context: Context) -> None:
        config, found, bank = context.config, module.factors, context.shared.get("bank")
        if problem := _incomplete(module, config.get("save_only_topk_weights") is True, bank is not None):
            claims.account_for(module.refs)
            if problem not in claims.problems:
                claims.problems.append(problem)
            return
        assert bank is not None  # else there was a problem
        most = config["topk"]
        if most == 1:
            # One vector has all the weight, so the saved weights are empty.
            claims.account_for(found[role] for role in _WEIGHTS if role in found)
        factors = (("bank", bank), *((role, ref) for role, ref in found.items() if most > 1 or role not in _WEIGHTS))
        update = self.update(module, context, factors=factors, settings=VbLoraSettings(most))
        claims.updates.append(update)
        size = (config["num_vectors"], config["vector_length"])
        if problems := misshaped(bank, size, "num_vectors and vector_length in adapter_config.json"):
            claims.misfit(problems[0])
        elif wrong := [ref for role, ref in factors[1:] if len(ref.shape) != 3]:
            claims.misfit(f"{wrong[0].name} is {list(wrong[0].shape)}; expected three dimensions")
        elif most > size[0]:
            claims.misfit(f"adapter_config.json: topk is {most}, but num_vectors is {size[0]}")

    def orient(self, update: ModuleUpdate, parameter: Parameter) -> ModuleUpdate | str:
        length = update.factor("bank").shape[1]
        kind = _LOGITS if update.has("logits_A") else _INDICES
        a, b = (update.factor(role).shape for role in kind)
        return oriented(update, parameter, b[0] * length, a[1] * length)

    def misfits(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        count, length = update.factor("bank").shape
        where = f"{update.module} {list(shape)}"
        if shape[0] % length or shape[1] % length:
            return [f"{where} is not made up of vectors of {length} numbers (vector_length)"]
        rank, most = update.rank, VbLoraSettings.of(update).topk
        pieces = {"A": (rank, shape[1] // length), "B": (shape[0] // length, rank)}
        last = {"logits": count, "indices": most, "weights": most - 1}
        expected = {f"{kind}_{letter}": (*of, size) for letter, of in pieces.items() for kind, size in last.items()}
        meaning = f"of {where}, with r = {rank} and topk = {most} in adapter_config.json"
        return all_misshaped(update, expected, meaning)

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        a = factors.kept("A", lambda: _pieces("A", factors, update).reshape(update.rank, -1))
        b = factors.kept("B", lambda: _pieces("B", factors, update).transpose(1, 2).reshape(-1, update.rank))
        if len(window.columns) < update.columns:
            a = a[:, window.columns.start : window.columns.stop]
        torch.mm(b[window.rows.start : window.rows.stop], a, out=scratch)
        add_scaled(tile, scratch, update.scaling)

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        count, length = update.factor("bank").shape
        most = VbLoraSettings.of(update).topk
        sizes = [update.rank * size for size in (update.rows, update.columns)]
        # For the larger: its k vectors, weighted and summed up; before that, the logits twice.
        making = max(sizes) * (2 * most + 2) + 3 * max(sizes) // length * count
        return (sum(sizes) + making) * itemsize + 2 * 8 * max(sizes) // length * most


def _incomplete(module: Module, only_top: bool, has_bank: bool) -> str:
    """The problem of a module's factors and the bank, if one is missing or too many."""
    found = module.factors
    wanted = (*_INDICES, *_WEIGHTS) if found.keys() - set(_LOGITS) else _LOGITS
    first = next(iter(found.values())).name
    if not has_bank:
        return "base_model.vblora_vector_bank is missing, of whose vectors all modules are made"
    if wanted is not _LOGITS and not only_top:
        return (
            f"{first} is of an adapter that saves only weights of the topk vectors, but adapter_config.json does not "
            "say save_only_topk_weights; PEFT would ignore it"
        )
    if extra := found.keys() - set(wanted):
        return f"{found[min(extra)].name} is there beside {found[min(found.keys() - extra)].name}; one must be"
    if missing := [role for role in wanted if role not in found]:
        return f"{first} is there without {module.key(key_of(VbLora.roles, missing[0]))}"
    return ""


def _pieces(letter: str, factors: Factors, update: Update) -> Tensor:
    """Weighted sums of vectors of the bank, (…, …, b)."""
    bank = factors.whole("bank")
    logits = factors.whole(f"logits_{letter}") if update.has(f"logits_{letter}") else _logits(letter, factors, update)
    highest, indices = logits.topk(VbLoraSettings.of(update).topk, dim=-1)
    weights = highest.softmax(dim=-1)
    pieces: Tensor = (weights.unsqueeze(-1) * bank[indices]).sum(-2)
    return pieces


def _logits(letter: str, factors: Factors, update: Update) -> Tensor:
    """Logits whose softmax are the saved weights."""
    count = len(factors.whole("bank"))
    indices = factors.whole(f"indices_{letter}")
    check_indices(update, f"indices_{letter}", indices, count)
    if update.has(f"weights_{letter}"):
        saved = factors.whole(f"weights_{letter}")
        weights = torch.cat([saved, (1 - saved.sum(-1, keepdim=True)).clamp_(min=0)], dim=-1)
    else:
        weights = torch.ones(indices.shape, dtype=factors.whole("bank").dtype, device=indices.device)
    logits = weights.new_full((*indices.shape[:-1], count), float("-inf"))
    return logits.scatter_(-1, indices, weights.log())
