"""WaveFT: W' = W + s · D⁻¹(S), D⁻¹ one step of an inverse wavelet transform in two dimensions of a sparse spectrum S.

W is (out, in). S has the file's n numbers at positions that the config's seed chooses, as for FourierFT (see
`adapters.methods.fourierft`), and zeros elsewhere. Of a wavelet of L taps S has L − 2 rows and columns more than W, and
one more where that is odd; its quarters are the averages and the three kinds of details. The transform is a
transposed convolution of stride 2 with the outer products of the wavelet's two filters; its middle is the delta.
Without ``use_idwt`` S itself is. Bilican et al. 2025, arXiv:2505.12532. Source: peft/tuners/waveft/layer.py and
waverec2d.py, 0.21.

The whole delta is made for a weight's first tile, and kept until its last. The bits are those of PEFT's
merge, for every dtype of the base.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from shardmerge.adapters.formats.checks import FLAG, Config, checked
from shardmerge.adapters.formats.peft_method import Module
from shardmerge.adapters.lazy_torch import Tensor, torch
from shardmerge.adapters.methods.fourierft import FourierFt, SpectrumSettings, positions, spectrum_of
from shardmerge.spec.updates import Settings, Update

_WAVELET = "db1"
#: The low-pass filters of reconstruction, of length one and an even number of taps, by the wavelet's name: Daubechies
#: (db), their nearly symmetric kin (sym) and coiflets (coif), to the nine digits that fix a float32. They are those of
#: Daubechies, "Ten Lectures on Wavelets", 1992, in the order and with the signs of PyWavelets.
WAVELETS: dict[str, list[float]] = json.loads(Path(__file__).with_name("wavelets.json").read_text(encoding="utf-8"))
WAVELETS |= {"sym2": WAVELETS["db2"], "sym3": WAVELETS["db3"]}


@dataclass(frozen=True, slots=True)
class WaveFtSettings(SpectrumSettings):
    """And the wavelet; None where S itself is the delta."""

    wavelet: str | None


class WaveFt(FourierFt):
    name = "waveft"
    peft_type = "WAVEFT"
    title = "WaveFT"
    paper = "arXiv:2505.12532"
    roles = {"waveft_spectrum": "spectrum"}
    settings = {
        **FourierFt.settings,
        "proportional_parameters": FLAG,
        "use_idwt": FLAG,
        "wavelet_family": checked(
            lambda value: isinstance(value, str) and value in WAVELETS,
            "a wavelet that PEFT has the filters of (db1 to db10, sym2 to sym10, coif1 to coif5)",
        ),
    }

    def settings_of(self, config: Config, module: Module) -> Settings:
        inverts = config.get("use_idwt")
        wavelet = (config.get("wavelet_family") or _WAVELET) if inverts or inverts is None else None
        return WaveFtSettings(*spectrum_of(config, module), wavelet)

    def delta(self, spectrum: Tensor, update: Update) -> Tensor:
        """D⁻¹(S), (out, in)."""
        rows, columns = (of.to(spectrum.device) for of in positions(update, len(spectrum)))
        wavelet = WaveFtSettings.of(update).wavelet
        if wavelet is None:
            delta = spectrum.new_zeros(update.rows, update.columns)
            delta[rows, columns] = spectrum
            return delta
        wide = torch.promote_types(spectrum.dtype, torch.float32)
        low = torch.tensor(WAVELETS[wavelet], dtype=wide, device=spectrum.device)
        high = low.flip(0) * torch.tensor([1.0, -1.0], dtype=wide, device=spectrum.device).repeat(len(low) // 2)
        more = len(low) - 2
        height, width = (size + more + (size + more) % 2 for size in (update.rows, update.columns))
        dense = torch.zeros(height, width, dtype=wide, device=spectrum.device)
        dense[rows + (height - update.rows) // 2, columns + (width - update.columns) // 2] = spectrum.to(wide)
        # Rows are averages, then details; so are columns.
        quarters = dense.view(2, height // 2, 2, width // 2).transpose(1, 2).reshape(1, 4, height // 2, width // 2)
        del dense
        filters = torch.stack(
            [row.outer(column) for row, column in ((low, low), (high, low), (low, high), (high, high))]
        )
        delta = torch.nn.functional.conv_transpose2d(quarters, filters.unsqueeze(1), stride=2)[0, 0]
        return delta[more : more + update.rows, more : more + update.columns].to(spectrum.dtype).contiguous()

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        # The spectrum, its quarters, the delta, and what the convolution takes: by measurement, up to eight times as
        # much. The order of all elements comes before, and takes less.
        taps = len(WAVELETS.get(WaveFtSettings.of(update).wavelet or "", ()))
        return (update.rows + taps) * (update.columns + taps) * (11 if taps else 3) * max(itemsize, 4)
