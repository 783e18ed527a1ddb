"""A custom node for long_run.py's own ComfyUI: what is alive in the server's process."""

import gc

import psutil
import torch


class CountObjects:
    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "test", "count", (), True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    @classmethod
    def IS_CHANGED(cls):
        return float("nan")  # count again every time

    def count(self):
        from comfy.model_patcher import ModelPatcher

        gc.collect()
        everything = gc.get_objects()
        tensors = [thing for thing in everything if issubclass(type(thing), torch.Tensor)]
        own = [thing for thing in everything if "Attune" in str(type(thing).__module__)]
        patchers = [thing for thing in everything if issubclass(type(thing), ModelPatcher)]
        found = [psutil.Process().memory_info().rss, len(everything), len(tensors), len(own), len(patchers)]
        return {"ui": {"counts": found}}


NODE_CLASS_MAPPINGS = {"CountObjects": CountObjects}
