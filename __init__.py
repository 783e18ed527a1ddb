"""ComfyUI-Attune: make every sampling step count. Imports nothing until the host asks for the nodes."""

import logging

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    try:
        from .nodes.extension import AttuneExtension
    except Exception:
        # The host reports only str(error) from here; keep the traceback for whoever has to fix it.
        logging.getLogger(__name__).exception("ComfyUI-Attune could not load its nodes.")
        raise
    return AttuneExtension()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
