"""Stored formats: bytes ↔ tiles in the compute dtype. One file a format; see `shardmerge.codecs.codec`."""
