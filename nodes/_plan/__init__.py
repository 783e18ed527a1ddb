"""Decisions, orchestration and reports that need no ComfyUI."""
