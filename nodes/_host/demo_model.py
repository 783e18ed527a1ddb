"""Tell the host's checkpoint loader what the embedded demo models are.

The host recognises models by the shapes in their state dict. Ours are recognised by one key that no other checkpoint
has, so the entries can never claim somebody else's file.
"""

from __future__ import annotations

from pathlib import Path

import comfy.latent_formats
import comfy.model_base
import comfy.ops
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch

from ...models import demo

TEXT_NAME = "attune"  # the text encoder is `clip_attune` inside the checkpoint


class DemoLatent(comfy.latent_formats.LatentFormat):
    """Unit-variance latents as they come out of the checkpoint's own TAESD; the factors serve the live preview."""

    latent_channels = 4
    scale_factor = 1.0

    def __init__(self):
        facts = demo.demo_facts()
        self.latent_rgb_factors, self.latent_rgb_factors_bias = facts["preview_factors"], facts["preview_bias"]


class DemoVideoLatent(comfy.latent_formats.LatentFormat):
    """Unit-variance latents of single frames, as they come out of the checkpoint's own TAESD."""

    latent_channels = 16
    latent_dimensions = 3
    scale_factor = 1.0

    def __init__(self):
        facts = demo.demo_facts("attune_demo_video")
        self.latent_rgb_factors, self.latent_rgb_factors_bias = facts["preview_factors"], facts["preview_bias"]


class DemoTextModel(comfy.sd1_clip.SDClipModel):
    """CLIP's text transformer at the demo model's width and vocabulary."""

    def __init__(self, words: int, device="cpu", dtype=None, model_options={}):  # noqa: B006 - the host's signature
        super().__init__(
            device=device, dtype=dtype, max_length=demo.MAX_TOKENS, textmodel_json_config=dict(demo.TEXT_CONFIG),
            special_tokens={"start": demo.BEGIN, "end": demo.END, "pad": demo.END}, model_options=model_options,
        )  # fmt: skip
        # The host's CLIP embedding has a fixed number of rows.
        rows = self.operations.Embedding(words, demo.TEXT_WIDTH, dtype=dtype, device=device)
        self.transformer.set_input_embeddings(rows)


class DemoTokenizer(comfy.sd1_clip.SDTokenizer):
    """The host's prompt parser (weights, embeddings, chunks) over whole words."""

    def __init__(self, embedding_directory=None, tokenizer_data={}):  # noqa: B006 - the host's signature
        super().__init__(
            tokenizer_path=demo.unpack_vocabulary(tokenizer_data[demo.VOCABULARY_KEY]), max_length=demo.MAX_TOKENS,
            tokenizer_class=demo.WordTokenizer, embedding_directory=embedding_directory, tokenizer_data=tokenizer_data,
            embedding_size=demo.TEXT_WIDTH, embedding_key=f"clip_{TEXT_NAME}",
        )  # fmt: skip


class DemoPromptTokenizer(comfy.sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data={}):  # noqa: B006 - the host's signature
        super().__init__(embedding_directory, tokenizer_data, clip_name=TEXT_NAME, tokenizer=DemoTokenizer)


class DemoTextEncoder(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, words: int, device="cpu", dtype=None, model_options={}):  # noqa: B006 - the host's signature
        names = {"clip_name": TEXT_NAME, "clip_model": DemoTextModel, "words": words}
        super().__init__(device=device, dtype=dtype, model_options=model_options, **names)


class DemoBase(comfy.model_base.BaseModel):
    """The host's UNet model, with the pooled text as a second condition (as SDXL, without its size embeddings)."""

    def encode_adm(self, **kwargs) -> torch.Tensor:
        return kwargs["pooled_output"]

    def set_inpaint(self) -> None:
        """The host's, with what grey is in these latents, for a run without a mask."""
        super().set_inpaint()
        grey = torch.tensor(demo.demo_facts("attune_demo_inpaint")["grey"])[:, None, None]
        self.blank_inpaint_image_like = lambda latent: grey.to(latent).expand_as(latent).clone()


class AttuneDemo(comfy.supported_models_base.BASE):
    """SD1.5's betas and v-prediction on a UNet of a tenth of its width."""

    unet_config = {
        "context_dim": demo.TEXT_WIDTH,
        "model_channels": demo.UNET_CONFIG["model_channels"],
        "adm_in_channels": demo.TEXT_WIDTH,
    }
    unet_extra_config = {"num_heads": -1, "num_head_channels": demo.UNET_CONFIG["num_head_channels"]}
    required_keys = {f"cond_stage_model.{demo.VOCABULARY_KEY}"}
    latent_format = DemoLatent
    supported_inference_dtypes = [torch.float16, torch.bfloat16, torch.float32]

    def model_type(self, state_dict, prefix=""):
        return comfy.model_base.ModelType.V_PREDICTION

    def get_model(self, state_dict, prefix="", device=None):
        model = DemoBase(self, model_type=self.model_type(state_dict, prefix), device=device)
        if self.inpaint_model():
            model.set_inpaint()
        return model

    def clip_target(self, state_dict={}):  # noqa: B006 - the host's signature
        return demo_clip_target(state_dict)


class AttuneDemoInpaint(AttuneDemo):
    """The same UNet for inpainting; its file holds the difference, the demo checkpoint the rest."""

    unet_config = {"model_channels": demo.UNET_CONFIG["model_channels"], "in_channels": demo.INPAINT_CHANNELS}
    required_keys = {
        f"cond_stage_model.{demo.VOCABULARY_KEY}", f"model.diffusion_model.{demo.DIFFERENCE}time_embed.0.bias"
    }  # fmt: skip

    def __init__(self, unet_config: dict):
        super().__init__({**unet_config, **demo.UNET_CONFIG, "in_channels": demo.INPAINT_CHANNELS})
        self.unet_config["num_classes"] = "sequential"  # the host counts it by a weight that the file does not hold

    def _part(self, *prefixes: str) -> dict[str, torch.Tensor]:
        base = comfy.utils.load_torch_file(str(Path(demo.__file__).parent / "weights" / "attune_demo.safetensors"))
        return comfy.utils.state_dict_prefix_replace(base, dict.fromkeys(prefixes, ""), filter_keys=True)

    def process_unet_state_dict(self, state_dict):
        return demo.with_difference(self._part("model.diffusion_model."), state_dict)

    def process_vae_state_dict(self, state_dict):
        return self._part(*self.vae_key_prefix)

    def process_clip_state_dict(self, state_dict):
        return self._part(*self.text_encoder_key_prefix)


class AttuneDemoVideo(comfy.supported_models.WAN21_T2V):
    """The host's Wan 2.1 with the demo's text encoder and latents of single frames."""

    unet_extra_config = {"text_dim": demo.TEXT_WIDTH}
    sampling_settings = {"shift": demo.VIDEO_SHIFT}
    required_keys = {f"cond_stage_model.{demo.VOCABULARY_KEY}"}
    latent_format = DemoVideoLatent
    vae_key_prefix = ["first_stage_model."]
    text_encoder_key_prefix = ["cond_stage_model."]

    def clip_target(self, state_dict={}):  # noqa: B006 - the host's signature
        return demo_clip_target(state_dict)


def demo_clip_target(state_dict: dict) -> comfy.supported_models_base.ClipTarget:
    words = len(demo.unpack_vocabulary(state_dict[f"cond_stage_model.{demo.VOCABULARY_KEY}"]))
    target = comfy.supported_models_base.ClipTarget(DemoPromptTokenizer, DemoTextEncoder)
    target.params["words"] = words
    return target


def register_demo_models() -> None:
    """Add the demo models to the host's list of known models, once.

    The video model stands before the host's Wan, which would take it for one of its own; the key that it requires is in
    no other checkpoint.
    """
    known = comfy.supported_models.models
    if not any(model.__name__ == AttuneDemo.__name__ for model in known):
        known.extend([AttuneDemo, AttuneDemoInpaint])
        known.insert(0, AttuneDemoVideo)
