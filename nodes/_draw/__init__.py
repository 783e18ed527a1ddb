"""Plots and pictures, drawn with Pillow alone."""
