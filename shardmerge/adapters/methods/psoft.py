"""PSOFT: W' = W + s · B (R − I) A, R a rotation within the subspace of W's r largest singular values; s = α / r.

W is (out, in). A (r, in) and B (out, r) are made of W = U S V: A = V_r and B = U_r S_r / s, or with ``pissa_init``
both get the root of S_r / s. They are not in the file, so W is decomposed again, exactly or (``psoft_svd: lowrank``)
by a random method with a seed. R, (r, r), comes from the r (r − 1) / 2 numbers above the diagonal of a skew-symmetric
Q, as Cayley's (I + Q)(I − Q)⁻¹ or the first terms of its series; or it is in the file whole (``psoft_orth: false``).
Vectors b and a (r), if there are any, scale its rows and columns. Wu et al. 2025, arXiv:2505.11235. Source:
peft/tuners/psoft/layer.py, 0.21.

R depends on the signs of the singular vectors, which are the library's choice: here those of LAPACK on the machine of
the merge, as PEFT itself has them when it loads an adapter. All of W is decomposed, which takes a multiple of its
memory. In float32 the bits are those of PEFT's merge; on a 16-bit base PEFT rounds the update before it adds it, we
round once.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardmerge.adapters.claims import Claims, ModuleUpdate
from shardmerge.adapters.formats.checks import FLAG, NUMBER, RANK, SEED, Config, checked, is_number, one_of, up_to
from shardmerge.adapters.formats.peft_method import Context, Module, PeftFamily, contradiction
from shardmerge.adapters.lazy_torch import Tensor, torch
from shardmerge.adapters.methods.base import Factors, all_misshaped
from shardmerge.adapters.methods.blocks import cayley, neumann
from shardmerge.adapters.methods.factored import Factored
from shardmerge.adapters.methods.osf import svd_bytes
from shardmerge.spec.tensors import RowRange
from shardmerge.spec.updates import Settings, Update


@dataclass(frozen=True, slots=True)
class PsoftSettings(Settings):
    """How R is made of its numbers, and A and B of W."""

    orthogonal: bool
    #: Terms of the series; 0 for Cayley's formula itself.
    terms: int
    #: The largest length of Q.
    most: float | None
    #: Whether A and B both get the root of S_r.
    even: bool
    #: Steps of the random method; 0 for the exact one.
    steps: int
    seed: int
    scaling: float


class Psoft(Factored, PeftFamily):
    name = "psoft"
    by_column_windows = False
    peft_type = "PSOFT"
    title = "PSOFT"
    updates = "Linear layers"
    mixes_weight = True  # W's subspace is rotated
    paper = "arXiv:2505.11235"
    note = "makes a weight's whole update at once, in memory that grows with the weight"
    roles = {"psoft_R.weight": "R", "psoft_R.vector_a": "a?", "psoft_R.vector_b": "b?"}
    settings = {
        "r": RANK,
        "psoft_alpha": NUMBER,
        "psoft_orth": FLAG,
        "psoft_mag_a": FLAG,
        "psoft_mag_b": FLAG,
        "use_cayley_neumann": FLAG,
        "num_cayley_neumann_terms": up_to(1000),
        "cayley_neumann_eps": checked(lambda value: is_number(value) and 0 < value < 1, "a number between 0 and 1"),
        "ab_svd_init": one_of("psoft_init", "pissa_init"),
        "psoft_svd": one_of("full", "lowrank"),
        "psoft_svd_lowrank_niter": up_to(1000),
        "random_seed": lambda key, value: [] if value is None else SEED(key, value),
    }
    inert = frozenset({"init_weights", "psoft_dropout"})

    def settings_of(self, config: Config, module: Module) -> Settings:
        series = config.get("use_cayley_neumann")
        return PsoftSettings(
            orthogonal=config.get("psoft_orth") is not False,
            terms=(config.get("num_cayley_neumann_terms") or 5) if series else 0,
            most=config.get("cayley_neumann_eps") if series else None,
            even=config.get("ab_svd_init") == "pissa_init",
            steps=(config.get("psoft_svd_lowrank_niter") or 10) if config.get("psoft_svd") == "lowrank" else 0,
            seed=config.get("random_seed") or 0,
            scaling=self.scaling_of(config, module),
        )

    def scaling_of(self, config: Config, module: Module) -> float:
        return float(config["psoft_alpha"] / config["r"])

    def claim_module(self, claims: Claims, module: Module, context: Context) -> None:
        config = context.config
        for letter in "ab":
            setting = f"psoft_mag_{letter}"
            if problem := contradiction(self.roles, module, letter, setting, config.get(setting) is not False):
                claims.reject(module.refs, problem)
                return
        claims.updates.append(self.update(module, context, of_base=(("W", "weight"),)))
        if config["psoft_alpha"] <= 0:
            claims.misfit(f"adapter_config.json: psoft_alpha must be above zero, found {config['psoft_alpha']}")

    def misfits(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        rank = update.rank
        if rank > min(shape):
            return [f"{update.module} {list(shape)} has less than r, {rank}, inputs or outputs"]
        expected = (rank * (rank - 1) // 2,) if PsoftSettings.of(update).orthogonal else (rank, rank)
        return all_misshaped(update, {"R": expected, "a": (rank,), "b": (rank,)}, f"as r {rank} and psoft_orth say")

    def left(self, factors: Factors, update: Update, rows: RowRange) -> Tensor:
        return factors.kept("left", lambda: self._left(factors, update))[rows.start : rows.stop]

    def right(self, factors: Factors, update: Update) -> Tensor:
        return self._both(factors, update)[update.rows :].t().contiguous()

    def _both(self, factors: Factors, update: Update) -> Tensor:
        return factors.kept("both", lambda: _main_directions(factors.whole("W"), update))

    def _left(self, factors: Factors, update: Update) -> Tensor:
        rotation = _rotation(factors, update)
        identity = torch.eye(update.rank, dtype=rotation.dtype, device=rotation.device)
        return self._both(factors, update)[: update.rows] @ (rotation - identity)

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        both = (update.rows + update.columns) * update.rank
        return svd_bytes(update) + (4 * both + 8 * update.rank**2) * max(itemsize, 4)


def _main_directions(weight: Tensor, update: Update) -> Tensor:
    """B (out, r), and below it Aᵀ (in, r)."""
    rank, of = update.rank, PsoftSettings.of(update)
    # Always on the CPU: another device may find the opposite directions, and draws other numbers.
    wide = weight.float().cpu()
    if of.steps:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(of.seed)  # and not the GPUs' too, as torch's does
            u, s, v = torch.svd_lowrank(wide, q=rank, niter=of.steps)
        right = v.t()
    else:
        u, s, right = torch.linalg.svd(wide, full_matrices=False)
    u, s, right = u[:, :rank], s[:rank] / of.scaling, right[:rank]
    if of.even:
        root = torch.diag(s.sqrt())
        left, right = u @ root, root @ right
    else:
        left = u @ torch.diag(s)
    return torch.cat((left, right.t())).to(weight)


def _rotation(factors: Factors, update: Update) -> Tensor:
    """R, (r, r)."""
    rank, rotation, of = update.rank, factors.whole("R"), PsoftSettings.of(update)
    if of.orthogonal:
        rows, columns = torch.triu_indices(rank, rank, 1, device=rotation.device)
        skew = rotation.new_zeros(rank, rank)
        skew[rows, columns] = rotation
        skew = skew - skew.t()
        if of.most is not None and (length := torch.linalg.norm(skew, ord="fro")) > of.most:
            skew = skew * (of.most / (length + 1e-12))
        rotation = neumann(skew, of.terms) if of.terms else cayley(-skew)
    if update.has("b"):
        rotation = factors.whole("b")[:, None] * rotation
    if update.has("a"):
        rotation = rotation * factors.whole("a")[None, :]
    return rotation
