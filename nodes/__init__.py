"""Nodes: one file a method; `extension` lists them. Importing this package alone asks nothing of ComfyUI."""
