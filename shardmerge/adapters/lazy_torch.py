"""torch, imported when it is first used: programs that compute nothing read the traits of families, too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["Tensor", "torch"]

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:

    class _Torch:
        """Has torch's attributes."""

        def __getattr__(self, name: str) -> Any:
            import torch

            return getattr(torch, name)

    torch, Tensor = _Torch(), Any
