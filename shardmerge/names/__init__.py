"""An adapter's names → places in the checkpoint.

Adapters carry the module names of the transformers version that trained them; checkpoints carry those of the version
that wrote them. ``shardmerge/data`` holds what transformers does to names and tensors on loading, as data.
"""

from shardmerge.names.places import Parameter, Place
from shardmerge.names.resolver import Names
from shardmerge.names.ties import Tie, is_head

__all__ = ["Names", "Parameter", "Place", "Tie", "is_head"]
