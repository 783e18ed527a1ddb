"""Everything that knows how ComfyUI works inside; no mathematics."""
