"""Train the demo model's text encoder alone: a caption must tell which object and which background it asks for.

It is frozen afterwards. Trained together with the UNet, its embeddings of different prompts stay nearly equal for long.
"""

from __future__ import annotations

import argparse
import json
import random

import torch
import torch.nn.functional as F
from common import DEVICE, WORK, load_checkpoint, pack, save_checkpoint, use_host

use_host()
pack()

import comfy.clip_model  # noqa: E402
from captions import ANY, BACKGROUND_SPELLINGS, BRIGHTNESS_NAMES, WORDS, draw  # noqa: E402
from data import BACKGROUND_NAMES, OBJECT_NAMES  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from pack.models.demo import MAX_TOKENS, TEXT_WIDTH, WordTokenizer  # noqa: E402
from pack.nodes._host.demo_model import DemoTextEncoder  # noqa: E402

PATH = WORK / "text.pt"
TOKENIZER = WordTokenizer(WORDS)


def initialise(module: nn.Module) -> None:
    """The host's layers skip initialisation; give them PyTorch's defaults."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.Linear.reset_parameters(layer)
        elif isinstance(layer, nn.modules.conv._ConvNd):
            nn.modules.conv._ConvNd.reset_parameters(layer)
        elif isinstance(layer, nn.Embedding):
            nn.init.normal_(layer.weight, std=0.5)
        elif isinstance(layer, nn.LayerNorm | nn.GroupNorm) and layer.weight is not None:
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)


def build() -> nn.Module:
    return DemoTextEncoder(len(WORDS)).float()


def trainable_layer(self, x, mask=None, optimized_attention=None):
    """The host adds in place, which autograd refuses; the same sum out of place."""
    x = x + self.self_attn(self.layer_norm1(x), mask, optimized_attention)
    return x + self.mlp(self.layer_norm2(x))


def token_ids(captions: list[str]) -> list[list[int]]:
    """One chunk of MAX_TOKENS a caption, padded with the end token as the host does."""
    rows = [TOKENIZER(text)["input_ids"][: MAX_TOKENS - 1] for text in captions]
    return [[*(row if row[-1] == 1 else [*row, 1]), *[1] * MAX_TOKENS][:MAX_TOKENS] for row in rows]


def encode(encoder: nn.Module, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Context [b MAX_TOKENS width] and pooled [b width]."""
    return encoder.clip_attune(token_ids(captions))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=192)
    args = parser.parse_args()
    if PATH.exists() and load_checkpoint(PATH)["log"][-1]["step"] >= args.steps:
        return
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rng = random.Random(0)
    stock_layer, comfy.clip_model.CLIPLayer.forward = comfy.clip_model.CLIPLayer.forward, trainable_layer

    encoder = build().to(DEVICE)
    initialise(encoder)
    nn.init.normal_(encoder.clip_attune.transformer.text_model.embeddings.position_embedding.weight, std=0.1)
    encoder.requires_grad_(True)
    objects, backgrounds = len(OBJECT_NAMES), len(BACKGROUND_SPELLINGS) + 1  # the last class: not mentioned
    heads = nn.ModuleList([nn.Linear(TEXT_WIDTH, objects + 1), nn.Linear(TEXT_WIDTH, backgrounds)]).to(DEVICE)
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.steps, pct_start=0.1)
    log = []
    for step in range(1, args.steps + 1):
        want = []
        for _ in range(args.batch):
            background = rng.choice([ANY, *range(backgrounds - 1)]) if rng.random() < 0.9 else ANY
            want.append((rng.randrange(objects), background))
        captions = [draw(rng, o, b) for o, b in want]
        captions[0], want[0] = "", (objects, ANY)
        _, pooled = encode(encoder, captions)
        target_object = torch.tensor([o for o, _ in want], device=DEVICE)
        target_background = torch.tensor([b % backgrounds for _, b in want], device=DEVICE)
        predicted = heads[0](pooled), heads[1](pooled)
        loss = F.cross_entropy(predicted[0], target_object) + F.cross_entropy(predicted[1], target_background)
        (loss + 0.05 * (pooled.square().mean() - 1).square()).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 100 == 0 or step == args.steps:
            right = [
                float((p.argmax(1) == t).float().mean())
                for p, t in zip(predicted, (target_object, target_background), strict=True)
            ]
            log.append({"step": step, "loss": round(loss.item(), 4), "object": right[0], "background": right[1]})
            print(
                json.dumps(log[-1]),
                len(WORDS),
                "words,",
                len(BACKGROUND_NAMES),
                "+",
                len(BRIGHTNESS_NAMES),
                "backgrounds",
                flush=True,
            )
    comfy.clip_model.CLIPLayer.forward = stock_layer  # for the stages after this one in the same process
    save_checkpoint(PATH, encoder=encoder.state_dict(), log=log, words=WORDS)


if __name__ == "__main__":
    main()
