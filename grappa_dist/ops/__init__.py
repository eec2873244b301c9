"""Pure mathematics on tensors: no files, no ranks, no globals."""
