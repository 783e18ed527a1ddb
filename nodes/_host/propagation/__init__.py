"""Encoder and block propagation inside the host."""
