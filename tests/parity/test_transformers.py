"""A random tiny Qwen3-VL that Hugging Face Transformers makes and saves loads unmodified and gives its logits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ivcore.config import ModelConfig
from ivcore.inputs import ModelInputs

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

IMAGE, VIDEO, OPEN, CLOSE = 81, 82, 83, 84
TOLERANCE = 1e-4
CASES = {
    # Heads wider than hidden / heads, two KV heads for six, a 4 x 4 position grid, two DeepStack features.
    "untied": {
        "text": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 20, "tie_word_embeddings": False},
        "rope": {"mrope_section": [4, 3, 3], "rope_theta": 1e4},
        "vision": {"depth": 3, "num_heads": 3, "hidden_size": 24, "deepstack_visual_indexes": [0, 2]},
    },
    # Tied embeddings, attention biases, no DeepStack, as many KV heads as heads.
    "tied": {
        "text": {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 16, "attention_bias": True},
        "rope": {"mrope_section": [4, 2, 2], "rope_theta": 5e6},
        "vision": {"depth": 2, "num_heads": 2, "hidden_size": 32, "deepstack_visual_indexes": []},
    },
}


@dataclass(frozen=True)
class Saved:
    """A folder that `save_pretrained` wrote, a prompt, and what the model that was saved says to it."""

    path: Path
    inputs: ModelInputs
    logits: np.ndarray
    text_logits: np.ndarray
    greedy_ids: list[int]


@pytest.fixture(scope="module", params=list(CASES))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    case, tied = CASES[request.param], request.param == "tied"
    config = transformers.Qwen3VLConfig(
        text_config={
            "vocab_size": 90, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 512, "tie_word_embeddings": tied, **case["text"],
            "rope_parameters": {"rope_type": "default", "mrope_interleaved": True, **case["rope"]},
        },
        vision_config={
            "intermediate_size": 40, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2,
            "out_hidden_size": 48, "num_position_embeddings": 16, **case["vision"],
        },
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=OPEN, vision_end_token_id=CLOSE,
        tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(7)
    model = transformers.Qwen3VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Weights of a fresh model are so small that most of it would not show in the logits.
            scale = 1.0 if parameter.ndim < 2 or "embed" in name else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn_like(parameter) * scale + ("norm" in name and name.endswith("weight")))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder, max_shard_size="60KB")

    def frame(kind: int, tokens: int) -> list[int]:
        return [OPEN, *[kind] * tokens, CLOSE]

    # Text, a video of 2 frames of 6 x 4 patches, an image of 2 x 10, a video of 1 frame of 4 x 4, text.
    token_ids = [1, 2, 3, *frame(VIDEO, 6), 4, 5, *frame(VIDEO, 6), 6, *frame(IMAGE, 5), 7, 8, *frame(VIDEO, 4), 9, 10]
    grids = np.array([[2, 6, 4], [1, 2, 10], [1, 4, 4]], np.int32)
    pixels = np.random.default_rng(3).standard_normal((48 + 20 + 16, 96), dtype=np.float32)
    prompt = {
        "input_ids": torch.tensor([token_ids]),
        "mm_token_type_ids": torch.tensor([[{IMAGE: 1, VIDEO: 2}.get(token, 0) for token in token_ids]]),
        "pixel_values": torch.from_numpy(pixels[48:68]),
        "image_grid_thw": torch.from_numpy(grids[1:2]).long(),
        "pixel_values_videos": torch.from_numpy(np.concatenate([pixels[:48], pixels[68:]])),
        "video_grid_thw": torch.from_numpy(grids[[0, 2]]).long(),
    }
    with torch.no_grad():
        logits = model(**prompt).logits[0].numpy()
        text_logits = model(input_ids=torch.arange(40)[None]).logits[0].numpy()
        answer = model.generate(**prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    inputs = ModelInputs(np.array(token_ids, np.int32), pixels, grids)
    yield Saved(folder, inputs, logits, text_logits, answer[0, len(token_ids) :].tolist())


def test_the_logits_of_images_and_videos_are_those_of_transformers(saved: Saved, backend: ModuleType) -> None:
    assert np.ptp(saved.logits) > 1, "the outside model says something"
    model = backend.load(saved.path)
    np.testing.assert_allclose(model.logits(saved.inputs), saved.logits, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(
        model.prefill(saved.inputs, model.new_cache(), chunk=5), saved.logits[-1], rtol=0, atol=TOLERANCE
    )


def test_the_logits_of_text_are_those_of_transformers(saved: Saved, backend: ModuleType) -> None:
    text = ModelInputs(np.arange(40, dtype=np.int32), None, None)
    np.testing.assert_allclose(backend.load(saved.path).logits(text), saved.text_logits, rtol=0, atol=TOLERANCE)


def test_greedy_answers_are_those_of_transformers(saved: Saved, backend: ModuleType) -> None:
    model = backend.load(saved.path)
    model.stop_ids = frozenset()
    assert list(model.generate(saved.inputs, max_tokens=8)) == saved.greedy_ids


def test_the_folder_is_in_shards_and_its_config_in_the_newer_spelling(saved: Saved) -> None:
    raw: dict[str, Any] = json.loads((saved.path / "config.json").read_text())
    assert raw["text_config"]["rope_parameters"]["mrope_section"]
    assert (saved.path / "model.safetensors.index.json").exists()
    config = ModelConfig.from_dir(saved.path)
    assert config.text.rope_scaling.rope_theta == raw["text_config"]["rope_parameters"]["rope_theta"]
    assert config.tie_word_embeddings == raw["tie_word_embeddings"]


def test_a_config_written_back_is_read_by_transformers(saved: Saved, tmp_path: Path) -> None:
    ours = ModelConfig.from_dir(saved.path)
    (tmp_path / "config.json").write_text(json.dumps(ours.to_dict()))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.text_config.rope_parameters["rope_theta"] == ours.text.rope_scaling.rope_theta
    assert tuple(theirs.text_config.rope_parameters["mrope_section"]) == ours.text.rope_scaling.mrope_section
    for field in ("hidden_size", "head_dim", "num_key_value_heads", "num_hidden_layers", "rms_norm_eps", "vocab_size"):
        assert getattr(theirs.text_config, field) == getattr(ours.text, field)
    assert theirs.tie_word_embeddings == ours.tie_word_embeddings
    assert tuple(theirs.vision_config.deepstack_visual_indexes) == ours.vision.deepstack_visual_indexes
