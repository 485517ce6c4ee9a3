"""HiRA: W' = W + W ∘ (B A), the product with W taken element by element.

W is (out, in), A (r, in), B (out, r); there is no scale. On a convolution A is (r, in, k…) and B (out, r, 1…),
kernels flattened. On an embedding, whose W is (V, D), A is (r, V), B (D, r), and B A speaks of Wᵀ. Huang et al., ICLR
2025, openreview TwJrTz9cRS (no arXiv id). Source: peft/tuners/hira/layer.py, 0.21.

In float32 the bits are those of PEFT's merge. On a bf16 or fp16 base PEFT rounds B A, then the product, then the sum;
we round once.
"""

from __future__ import annotations

from shardmerge.adapters.claims import Claims, ModuleUpdate, shown
from shardmerge.adapters.formats.checks import RANK, RANK_PATTERN, rank_of
from shardmerge.adapters.formats.peft_method import Context, Module, PeftFamily
from shardmerge.adapters.lazy_torch import Tensor
from shardmerge.adapters.methods.base import Factors
from shardmerge.adapters.methods.lora import Lora, pair_problem
from shardmerge.spec.tensors import Orientation, transposed_if
from shardmerge.spec.updates import Parameter, Update, Window


class Hira(Lora, PeftFamily):
    name = "hira"
    adds = False
    peft_type = "HIRA"
    title = "HiRA"
    paper = "ICLR 2025, TwJrTz9cRS"
    roles = {"hira_A": "A?", "hira_B": "B?", "hira_embedding_A": "embedding_A?", "hira_embedding_B": "embedding_B?"}
    settings = {"r": RANK, "rank_pattern": RANK_PATTERN}
    inert = frozenset({"hira_dropout", "init_weights"})

    def claim_module(self, claims: Claims, module: Module, context: Context) -> None:
        infix = "embedding_" if module.factors.keys() & {"embedding_A", "embedding_B"} else ""
        wanted = (f"{infix}A", f"{infix}B")
        if len(module.factors) > 2 or module.factors.keys() - set(wanted):
            claims.reject(module.refs, f"{module.name} has the factors both of an embedding and of another layer")
            return
        if missing := [role for role in wanted if role not in module.factors]:
            claims.half(module.first, module.key(f"hira_{missing[0]}"))
            return
        a, b = (module.factors[role] for role in wanted)
        # PEFT reads rank_pattern only where a module has an adapter already, so r may hold, too.
        rank = rank_of(context.config, module.name)
        factors = (("A", a), ("B", b))
        claims.updates.append(self.update(module, context, factors=factors, orientation=transposed_if(infix)))
        if problem := pair_problem(a, b):
            claims.misfit(problem)
        elif a.shape[0] != b.shape[1] or a.shape[0] not in (rank, context.config["r"]):
            claims.misfit(
                f"{shown(a, b)} have rank {a.shape[0]} and {b.shape[1]}, but adapter_config.json says {rank} for "
                f"{module.name} (r and rank_pattern)"
            )

    def orient(self, update: ModuleUpdate, parameter: Parameter) -> ModuleUpdate | str:
        """As for LoRA, but without ``fan_in_fan_out``, which PEFT's HiRA saves as it was asked for, not as it is."""
        square = len(parameter.shape) == 2 and parameter.shape[0] == parameter.shape[1]
        unclear = square and parameter.in_memory is Orientation.UNKNOWN and update.orientation is Orientation.SAME
        if unclear and update.in_memory is Orientation.TRANSPOSED:
            return (
                f"{update.module}: adapter_config.json says fan_in_fan_out, but PEFT's HiRA goes by the layer's class, "
                f"and whether {list(parameter.shape)} is of a Conv1D cannot be known in an architecture that is not; "
                "merge it with PEFT"
            )
        return super().orient(update, parameter)

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        self.product(factors, update, window, scratch)
        tile.add_(scratch.mul_(tile))
