"""Everything that knows how ComfyUI works inside; no mathematics. Its first import says when a host is too old."""

from .version import check_host

check_host()
