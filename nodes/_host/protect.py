"""Gradients of an inpainting model's first call, through its own arithmetic, to the pixels that it is shown."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...kernels.protect import Protection, in_levels, objective, own_prediction, protect, shown
from .identity import prediction
from .session import stop_if_asked

LOG = logging.getLogger(__name__)
WHO = "Attune Protect Image"
CONCAT = ("mask", "masked_image")  # what the host adds to the noisy latent of an inpainting model of the SD class
_PIXELS = 8  # pixels of a latent's


def check_inpainting(model: Any, vae: Any) -> None:
    """ValueError, in one sentence, for what this protection is not made for."""
    base = model.model
    if tuple(getattr(base, "concat_keys", ())) != CONCAT:
        raise ValueError(
            f"{WHO} needs an inpainting model of the SD class, whose network is shown the mask and the masked picture, "
            f"but this MODEL ({type(base).__name__}) is not: load such a checkpoint, for example sd-v1-5-inpainting."
        )
    channels = model.get_model_object("latent_format").latent_channels
    if getattr(vae, "latent_dim", 2) != 2 or vae.latent_channels != channels:
        raise ValueError(
            f"{WHO} needs the VAE of its model, with {channels} latent channels: connect the checkpoint's."
        )


def fitted_masks(masks: Tensor, height: int, width: int) -> Tensor:
    """MASKs as [n h w] of 0 and 1 at a picture's size, as InpaintModelConditioning makes them."""
    stack = masks.reshape(-1, 1, *masks.shape[-2:]).float()
    sized = F.interpolate(stack, (height, width), mode="bilinear").round()[:, 0]
    for i, mask in enumerate(sized):
        if mask.all() or not mask.any():
            what = "covers the whole picture, and nothing is kept" if mask.any() else "is empty"
            raise ValueError(
                f"{WHO}: mask {i + 1} of {len(sized)} {what}. White is what others may paint anew; mark that alone."
            )
    return sized


def cropped(height: int, width: int) -> tuple[slice, slice]:
    """The rows and columns that InpaintModelConditioning keeps: multiples of 8, from the middle."""
    if min(height, width) < _PIXELS:
        raise ValueError(
            f"{WHO} needs a picture of at least {_PIXELS} x {_PIXELS} pixels, but 'image' has {width} x {height}: "
            "connect the whole picture."
        )
    rows, columns = (n // _PIXELS * _PIXELS for n in (height, width))
    top, left = height % _PIXELS // 2, width % _PIXELS // 2
    return slice(top, top + rows), slice(left, left + columns)


class Editor:
    """Copies in float32 of a MODEL's network and a VAE's encoder, which gradients can go through.

    The host makes its weights in inference mode, where nothing is kept for a gradient; copies also leave MODEL and VAE
    as they are, whatever happens. `with checkpointed()` the way back computes the blocks' results again, and none is
    kept.
    """

    def __init__(self, model: Any, vae: Any, conditioning: list, shape: tuple[int, ...]):
        comfy.model_management.load_models_gpu([model, vae.patcher], force_full_load=True)  # with their LoRAs
        self.device, self.vae = comfy.model_management.get_torch_device(), vae
        self.base = with_network(model, _float_copy(model.model.diffusion_model, self.device))
        decoder = [part for name, part in vae.first_stage_model.named_children() if "decoder" in name]
        self.encoder: Any = _float_copy(vae.first_stage_model, self.device, without=decoder)
        self.latent = torch.zeros(shape, device=self.device)
        self.told = self._conditions(conditioning)
        self.kind = prediction(self.base.model_sampling)
        self.sigma = torch.as_tensor(float(self.base.model_sampling.sigma_max), device=self.device)
        self._blocks = [*_blocks(self.base.diffusion_model), *_blocks(_encoder_of(self.encoder))]

    def _conditions(self, conditioning: list) -> dict[str, Tensor]:
        """What the network is told beside the picture: as the host makes it of the first of a CONDITIONING."""
        conds = comfy.sampler_helpers.convert_cond(conditioning[:1])
        mask = torch.ones_like(self.latent[:, :1])
        made = comfy.samplers.encode_model_conds(
            self.base.extra_conds, conds, self.latent, self.device, "positive", latent_image=self.latent,
            denoise_mask=mask,
        )[0]["model_conds"]  # fmt: skip
        told = {name: cond for name, cond in made.items() if name != "c_concat"}
        return {
            name: cond.process_cond(batch_size=1, device=self.device, area=None).cond.float().clone()
            for name, cond in told.items()
        }

    @contextlib.contextmanager
    def checkpointed(self) -> Iterator[None]:
        for block in self._blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        try:
            yield
        finally:
            for block in self._blocks:
                del block.forward

    def encoded(self, picture: Tensor) -> Tensor:
        """The VAE's latent [1 c h w] of a picture."""
        return self.encoder.encode(self.vae.process_input(picture)).float()

    def predicted(self, draws: torch.Generator, picture: Tensor, mask: Tensor) -> Tensor:
        """What the network says [1 c h w] at the first level of a run, of a latent of noise alone."""
        noise = torch.randn(self.latent.shape, generator=draws).to(self.device)
        x = self.base.model_sampling.noise_scaling(self.sigma, noise, self.latent, True)
        concat = self.base.concat_cond(
            noise=noise, device=self.device, concat_latent_image=self.encoded(picture), concat_mask=mask[:, None]
        )
        denoised = self.base.apply_model(x, self.sigma[None], c_concat=concat, **self.told)
        return own_prediction(x, denoised, self.sigma, self.kind)

    def loss(self, draws: torch.Generator, picture: Tensor, mask: Tensor) -> Tensor:
        """The published one, of a masked picture."""
        return objective(self.predicted(draws, picture, mask))

    @torch.no_grad()
    def length(self, seed: int, picture: Tensor, mask: Tensor) -> float:
        """Of the prediction from one noise, of a whole picture."""
        return -float(self.loss(torch.Generator().manual_seed(seed), shown(picture, mask), mask))


def with_network(model: Any, network: Any) -> Any:
    """The host's model of a MODEL around another network; the host's own stays as it is."""
    base = copy.copy(model.model)
    base.__dict__ = dict(base.__dict__)
    base._modules = {**base._modules, "diffusion_model": network}
    base.manual_cast_dtype = None
    base.model_sampling = model.get_model_object("model_sampling")
    network.dtype = torch.float32
    return base


def _float_copy(network: nn.Module, device: torch.device, without: list[nn.Module] = []) -> nn.Module:  # noqa: B006
    """A network of its own, whose tensors belong to no inference mode; `without` some parts."""
    memo: dict[int, Any] = {id(part): None for part in without}
    for part in network.modules():
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is not None:
                kind = torch.float32 if tensor.is_floating_point() else tensor.dtype
                fresh = tensor.detach().to(device, kind, copy=True)
                held = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(fresh, requires_grad=False) if held else fresh
    return copy.deepcopy(network, memo)


def _encoder_of(autoencoder: nn.Module) -> nn.Module:
    return next((part for name, part in autoencoder.named_children() if "encoder" in name), autoencoder)


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The largest parts below a network that compute something themselves, as the host's Train LoRA finds them."""
    for part in network.children():
        if isinstance(part, nn.Sequential) or type(part).forward is nn.Module.forward:
            yield from _blocks(part)
        elif any(True for _ in part.parameters()):
            yield part


def memory_needed(model: Any, vae: Any, height: int, width: int) -> tuple[int, int]:
    """Bytes of the copies, and about those of one iteration: the host's own figures for a call, and as much again."""
    weights = [*model.model.diffusion_model.parameters(), *_encoder_of(vae.first_stage_model).parameters()]
    channels = model.get_model_object("latent_format").latent_channels
    shape = (1, channels, height // _PIXELS, width // _PIXELS)
    once = vae.memory_used_encode((1, 3, height, width), torch.float32) + model.model.memory_required(shape)
    return 4 * sum(one.numel() for one in weights), int(2 * once)


def protected(
    model: Any, vae: Any, conditioning: list, pictures: list[tuple[Tensor, Tensor]], settings: Protection, seed: int,
    checkpointing: bool, told: Callable[[int, int, Tensor], None],
) -> list[tuple[Tensor, float, float]]:  # fmt: skip
    """Each picture [1 3 h w] with its masks [n h w], protected; with the length of one prediction before and after.

    told: hears of every iteration: picture, iteration, what it is now. Stopped, nothing stays.
    """
    found: list[tuple[Tensor, float, float]] = []
    height, width = pictures[0][0].shape[2:]
    comfy.model_management.free_memory(
        sum(memory_needed(model, vae, height, width)), comfy.model_management.get_torch_device()
    )
    with torch.inference_mode(False), torch.enable_grad():
        channels = model.get_model_object("latent_format").latent_channels
        editor = Editor(model, vae, conditioning, (1, channels, height // _PIXELS, width // _PIXELS))
        for i, (picture, masks) in enumerate(pictures):
            draws = torch.Generator().manual_seed(seed)
            start = picture.to(editor.device, torch.float32, copy=True)
            steps = protect(start, masks.to(editor.device, copy=True), partial(editor.loss, draws), settings, draws)
            now = start
            with editor.checkpointed() if checkpointing else contextlib.nullcontext(), contextlib.closing(steps):
                for k, now in enumerate(steps):
                    told(i, k + 1, now)
                    stop_if_asked()
            now = in_levels(start, now)
            before, after = (editor.length(seed, one, masks[:1].to(editor.device)) for one in (start, now))
            found.append((now.cpu(), before, after))
    return found
