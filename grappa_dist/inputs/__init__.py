"""What `data.train` and `data.test` may name besides shards: folders, tables and lists of images."""

from grappa_dist.inputs.entries import Inputs, living_shards_of, look, prepared, shards_of
from grappa_dist.inputs.kinds import kind_of

__all__ = ["Inputs", "kind_of", "living_shards_of", "look", "prepared", "shards_of"]
