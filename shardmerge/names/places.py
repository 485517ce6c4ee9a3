"""Where a parameter lies in a checkpoint: the nouns that others see (they live with the other nouns)."""

from shardmerge.spec import Parameter, Place

__all__ = ["Parameter", "Place"]
