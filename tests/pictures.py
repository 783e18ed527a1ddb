"""What a picture shows, as far as plain arithmetic can tell."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

VOCABULARY = Path(__file__).resolve().parents[1] / "training" / "vocabulary.json"
COLOURS = json.loads(VOCABULARY.read_text("utf-8"))["backgrounds"]


def load(path) -> np.ndarray:
    """RGB in 0..255, float [h w 3]."""
    return np.asarray(Image.open(path).convert("RGB"), dtype=float)


def background(picture: np.ndarray) -> np.ndarray:
    """The median colour of the four corners (an eighth of the side each), [3]."""
    n = picture.shape[0] // 8
    corners = [picture[:n, :n], picture[:n, -n:], picture[-n:, :n], picture[-n:, -n:]]
    return np.median(np.concatenate([corner.reshape(-1, 3) for corner in corners]), axis=0)


def centre(picture: np.ndarray) -> np.ndarray:
    """The mean colour of the middle half of the picture, [3]."""
    n = picture.shape[0] // 4
    return picture[n:-n, n:-n].reshape(-1, 3).mean(axis=0)


def saved(server, entry: dict) -> list[Path]:
    """The files that a run saved, by its entry in the history."""
    images = [image for output in entry["outputs"].values() for image in output.get("images", [])]
    return [server.output / image["subfolder"] / image["filename"] for image in images if image["type"] == "output"]


def asked_background(prompt: dict) -> str:
    """The background that the workflow's prompt names; the longest name wins ("light blue", not "blue")."""
    texts = [node["inputs"]["text"] for node in prompt.values() if node["class_type"] == "CLIPTextEncode"]
    return max((name for name in COLOURS if any(f"{name} background" in text for text in texts)), key=len)


def check(files: list[Path], prompt: dict) -> None:
    """Every picture of a run shows something on the background that was asked for; a card is a large sheet."""
    cards, drawn = ([one for one in files if one.name.startswith("card") is wanted] for wanted in (True, False))
    assert drawn and all(load(card).shape[1] > 1000 for card in cards)
    if any(node["class_type"] == "AttuneFilm" for node in prompt.values()):  # of the small video model
        assert all(frame.shape == (64, 64, 3) and frame.std() > 10 for frame in map(load, drawn))
        return
    want = np.array(COLOURS[asked_background(prompt)])
    for picture in map(load, drawn):
        assert picture.shape == (128, 128, 3)
        assert np.abs(background(picture) - want).max() < 40
        assert np.abs(centre(picture) - want).max() > 20
