"""FourierFT: W' = W + s · Re F⁻¹(S), F⁻¹ the inverse Fourier transform in two dimensions of a sparse spectrum S.

W is (out, in). S, (out, in), has the file's n numbers at n positions, and zeros elsewhere. The positions are not in
the file: they are the first n of a random order of all of W's elements, by the config's ``random_loc_seed``. Gao et al.
2024, arXiv:2405.03003. Source: peft/tuners/fourierft/layer.py, 0.21.

Every element of the delta depends on every number, so the whole delta is made for a weight's first tile, and kept
until its last. The bits are those of PEFT's merge, for every dtype of the base.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardmerge.adapters.claims import ModuleUpdate
from shardmerge.adapters.formats.checks import NUMBER, RANK, RANK_PATTERN, SEED, Config, pattern_value
from shardmerge.adapters.formats.peft_method import Module, PeftFamily
from shardmerge.adapters.lazy_torch import Tensor, torch
from shardmerge.adapters.methods.base import Factors, add_scaled
from shardmerge.spec.updates import Settings, Update, Window


@dataclass(frozen=True, slots=True)
class SpectrumSettings(Settings):
    """The number of coefficients, if the config says it, and the seed of their positions."""

    count: int | None
    seed: int


class FourierFt(PeftFamily):
    name = "fourierft"
    sides = ("", "")  # nothing but the config's flag shows it
    builds = True
    by_column_windows = True
    neutral_if_zero = frozenset({"spectrum"})
    adds = True
    peft_type = "FOURIERFT"
    title = "FourierFT"
    updates = "Linear layers"
    paper = "arXiv:2405.03003"
    note = "makes a weight's whole update at once, in memory that grows with the weight"
    roles = {"fourierft_spectrum": "spectrum"}
    settings = {"n_frequency": RANK, "n_frequency_pattern": RANK_PATTERN, "scaling": NUMBER, "random_loc_seed": SEED}
    inert = frozenset({"init_weights"})

    def settings_of(self, config: Config, module: Module) -> Settings:
        return SpectrumSettings(*spectrum_of(config, module))

    def scaling_of(self, config: Config, module: Module) -> float:
        return float(config["scaling"])

    def misfits(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        spectrum, count = update.factor("spectrum"), SpectrumSettings.of(update).count
        found = f"{spectrum.name} is {list(spectrum.shape)}"
        if len(spectrum.shape) != 1 or count not in (None, spectrum.shape[0]):
            expected = "(n)" if count is None else f"[{count}]"
            return [f"{found}; expected {expected}, as n_frequency in adapter_config.json says"]
        if spectrum.shape[0] > shape[0] * shape[1]:
            return [f"{found}, but {update.module} has {shape[0]} × {shape[1]} elements only"]
        return []

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        delta = factors.kept("delta", lambda: self.delta(factors.whole("spectrum"), update))
        part = delta[window.rows.start : window.rows.stop, window.columns.start : window.columns.stop]
        add_scaled(tile, scratch.copy_(part), update.scaling)

    def delta(self, spectrum: Tensor, update: Update) -> Tensor:
        """Re F⁻¹(S), (out, in)."""
        rows, columns = positions(update, len(spectrum))
        # PEFT's spectrum is float32 in any case.
        dense = torch.zeros(update.rows, update.columns, device=spectrum.device)
        dense[rows.to(spectrum.device), columns.to(spectrum.device)] = spectrum.float()
        delta: Tensor = torch.fft.ifft2(dense).real.to(spectrum.dtype)
        return delta.contiguous()

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        # The delta; before it the spectrum, real and complex, and its transform. The order of all elements takes less.
        return update.rows * update.columns * (itemsize + 4 + 3 * 8)


def spectrum_of(config: Config, module: Module) -> tuple[int | None, int]:
    """The fields of `SpectrumSettings` for a module."""
    count = pattern_value(config.get("n_frequency_pattern"), module.name, config["n_frequency"])
    return None if config.get("proportional_parameters") else count, config["random_loc_seed"]


def positions(update: Update, count: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the numbers, by the seed."""
    generator = torch.Generator().manual_seed(SpectrumSettings.of(update).seed)
    order = torch.randperm(update.rows * update.columns, generator=generator)[:count]
    return order // update.columns, order % update.columns
