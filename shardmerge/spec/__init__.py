"""The nouns: frozen, slotted dataclasses that are only data.

A *tensor* is stored; a *weight* is logical. Offsets and sizes are bytes, row ranges are half-open, shapes are as
stored (a Linear weight is ``(out, in)``). Everything here pickles and turns into JSON, so that a plan can be printed,
hashed, kept or sent elsewhere.
"""
