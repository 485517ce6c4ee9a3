"""An adapter's names → places in the checkpoint.

Adapters carry the module names of the transformers version that trained them; checkpoints carry those of the version
that wrote them. ``shardmerge/data`` holds what transformers does to names and tensors on loading, as data.
"""

from shardmerge.names.heads import LABELS, Head, head_for
from shardmerge.names.places import Parameter, Place
from shardmerge.names.resolver import Names
from shardmerge.names.spoken import Speakers, Spoken
from shardmerge.names.ties import Tie, is_head

__all__ = ["LABELS", "Head", "Names", "Parameter", "Place", "Speakers", "Spoken", "Tie", "head_for", "is_head"]
