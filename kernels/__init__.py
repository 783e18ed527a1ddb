"""The mathematics: tensors in, tensors out; no host, no files, no global state."""
