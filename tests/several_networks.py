"""One MODEL on several networks, as newer hosts have it for several GPUs: simulated on any host."""

from __future__ import annotations

import copy
import inspect
import threading

import torch


def on_another_network(model):
    """The clone that newer hosts make for each further GPU: with the same patches, on a network of its own."""
    from comfy.model_management import unload_all_models
    from comfy.patcher_extension import CallbacksMP

    unload_all_models()  # the other network comes from the file, without patches
    config = model.model.model_config
    base = copy.deepcopy(model.model, {id(model.model.current_patcher): None, id(config): config})
    if "model_override" in inspect.signature(model.clone).parameters:
        return model.clone(model_override=(base, ({}, {}, {}, set())))
    clone = model.clone()
    clone.model, clone.backup, clone.object_patches_backup = base, {}, {}
    for callback in model.get_all_callbacks(CallbacksMP.ON_CLONE):
        callback(model, clone)
    return clone


def apart(model):
    """A clone of MODEL each of whose prompts is asked in a thread of its own, the second one on another network."""
    from comfy.model_management import load_models_gpu
    from comfy.patcher_extension import WrappersMP

    other = on_another_network(model)
    load_models_gpu([other])
    other.pre_run()

    def split(executor, base, conds, x, timestep, options):
        answers, inference = [torch.zeros_like(x)] * len(conds), torch.is_inference_mode_enabled()

        def ask(i: int):
            with torch.inference_mode(inference):
                alone = [cond if j == i else None for j, cond in enumerate(conds)]
                answers[i] = executor([base, other.model][i], alone, x, timestep, options)[i]

        threads = [threading.Thread(target=ask, args=(i,)) for i, cond in enumerate(conds) if cond is not None]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "test.gpus", split)
    return clone, other
