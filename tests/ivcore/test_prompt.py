"""Prompts with media, against Hugging Face's Qwen3-VL processor, and what malformed messages say."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ivcore.errors import MediaError, PromptError
from ivcore.inputs import ModelInputs
from ivcore.processor import ProcessorConfig
from ivcore.prompt import build_inputs
from ivcore.tokenizer import Tokenizer

REFERENCE = Path(__file__).resolve().parents[1] / "data" / "reference"
MICRO = REFERENCE / "iv3-micro"
CASES = json.loads((REFERENCE / "processor" / "cases.json").read_text())
START, END, IMAGE, VIDEO = 502, 503, 505, 506

PICTURE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
FRAMES = np.random.default_rng(0).integers(0, 256, (12, 48, 64, 3), dtype=np.uint8)
VIDEO_PART = {"type": "video", "video": FRAMES, "fps": 4.0}
TEXT_PART = {"type": "text", "text": "What is it?"}


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def micro_tokenizer(**processor: Any) -> Tokenizer:
    tokenizer = Tokenizer.from_dir(MICRO)
    tokenizer.processor = replace(ProcessorConfig(), **processor)
    return tokenizer


def processor_of(case: dict[str, Any]) -> dict[str, Any]:
    size = case.get("size", {"shortest_edge": 4_096, "longest_edge": 25_165_824})
    return {"fps": case["fps"], "video_min_pixels": size["shortest_edge"], "video_max_pixels": size["longest_edge"]}


def assert_pixels_close(inputs: ModelInputs, expected: np.ndarray) -> None:
    difference = (
        np.abs(np.asarray(inputs.pixels) - expected.astype(np.float32)) * 0.5
    )  # the standard deviation: units of 0..1
    assert difference.shape == expected.shape
    # The float16 files round by up to 2 ** -12 as well.
    assert np.quantile(difference, 0.999) <= 2 / 255 + 1e-3
    assert difference.max() <= 6 / 255 + 1e-3


@pytest.mark.parametrize("name", ["smooth", "odd", "tiny"])
def test_arrays_of_frames_become_the_reference_s_prompt(name: str) -> None:
    case, tokenizer = CASES[name], micro_tokenizer(**processor_of(CASES[name]))
    with np.load(REFERENCE / "processor" / f"{name}.npz") as file:
        expected = dict(file)
    part = {"type": "video", "video": expected["frames"], "fps": case["video_fps"]}
    inputs = build_inputs(tokenizer, user(part, {"type": "text", "text": case["question"]}))
    assert tokenizer.decode(inputs.token_ids, skip_special_tokens=False) == case["text"]
    assert inputs.token_ids.tolist() == tokenizer.encode(case["text"])
    np.testing.assert_array_equal(inputs.grid_thw, expected["video_grid_thw"])
    np.testing.assert_allclose(inputs.media[0].timestamps, expected["frame_indices"] / case["video_fps"])
    assert_pixels_close(inputs, expected["pixel_values_videos"])


def test_an_image_becomes_the_reference_s_prompt() -> None:
    with np.load(REFERENCE / "processor" / "image.npz") as file:
        expected = dict(file)
    parts = [{"type": "image", "image": expected["image"]}, {"type": "text", "text": "x"}]
    inputs = build_inputs(micro_tokenizer(), user(*parts))
    placeholders = int((expected["input_ids"] == 151655).sum())
    assert inputs.token_ids.tolist().count(IMAGE) == placeholders
    np.testing.assert_array_equal(inputs.grid_thw, expected["image_grid_thw"])
    assert_pixels_close(inputs, expected["pixel_values"])


@pytest.mark.parametrize("name", ["smooth", "odd", "tiny", "image", "dog", "pool"])
def test_the_qwen_tokenizer_gives_the_reference_s_ids(name: str, shared_dir: Path) -> None:
    tokenizer = Tokenizer(json.loads((shared_dir / "reference/qwen-tokenizer/tokenizer.json").read_text()))
    with np.load(shared_dir / "reference/processor" / f"{name}.npz") as file:
        expected = dict(file)
    if name == "image":
        inputs = build_inputs(
            tokenizer, user({"type": "image", "image": expected["image"]}, {"type": "text", "text": "x"})
        )
        opening, closing = (
            tokenizer.encode("<|im_start|>user\n"),
            tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n"),
        )
        assert inputs.token_ids.tolist() == [*opening, *expected["input_ids"].tolist(), *closing]
        assert_pixels_close(inputs, expected["pixel_values"])
        return
    case = CASES[name]
    tokenizer.processor = replace(tokenizer.processor, **processor_of(case))
    video = {"video": expected["frames"], "fps": case["video_fps"]} if "frames" in expected else {}
    part = {"type": "video", "video": str(shared_dir / f"videos/{name}.mp4"), **video}
    inputs = build_inputs(tokenizer, user(part, {"type": "text", "text": case["question"]}))
    np.testing.assert_array_equal(inputs.token_ids, expected["input_ids"])
    np.testing.assert_array_equal(inputs.grid_thw, expected["video_grid_thw"])
    times = expected["frame_indices"] / case["video_fps"]
    np.testing.assert_allclose(inputs.media[0].timestamps, times, atol=1e-6)
    assert_pixels_close(inputs, expected["pixel_values_videos"])


def test_media_are_placed_where_they_stand_in_the_messages(make_clip: Callable[..., Path]) -> None:
    clip = make_clip(frames=8, fps=4, size=(64, 64))
    messages = [
        {"role": "system", "content": "Look."},
        *user({"type": "image", "image": PICTURE}, {"type": "text", "text": "and"}, {"type": "video", "video": clip}),
        {"role": "assistant", "content": "A clip."},
        *user(VIDEO_PART, TEXT_PART),
    ]
    inputs = build_inputs(MICRO, messages, fps=2)
    assert [each.kind for each in inputs.media] == ["image", "video", "video"]
    assert inputs.media[1].source == str(clip)
    np.testing.assert_allclose(inputs.media[1].timestamps, np.array([0, 2, 5, 7]) / 4)
    assert inputs.grid_thw is not None and inputs.pixels is not None
    assert inputs.grid_thw[:, 0].tolist() == [1, 2, 3]
    tokens = inputs.grid_thw.prod(axis=1) // 4
    ids = inputs.token_ids.tolist()
    assert (ids.count(IMAGE), ids.count(VIDEO)) == (tokens[0], tokens[1] + tokens[2])
    assert ids.count(START) == ids.count(END) == 1 + 2 + 3
    assert len(inputs.pixels) == inputs.grid_thw.prod(axis=1).sum()
    text = Tokenizer.from_dir(MICRO).decode(inputs.token_ids)  # without the special tokens
    assert text == (
        "system\nLook.\nuser\nand<0.2 seconds><1.5 seconds>\nassistant\nA clip.\n"
        "user\n<0.2 seconds><1.4 seconds><2.5 seconds>What is it?\nassistant\n"
    )


def test_a_timestamp_merges_with_the_text_before_it() -> None:
    parts = [{"type": "text", "text": "now "}, VIDEO_PART, TEXT_PART]
    inputs = build_inputs(MICRO, user(*parts))
    tokenizer = Tokenizer.from_dir(MICRO)
    assert inputs.token_ids.tolist() == tokenizer.encode(tokenizer.decode(inputs.token_ids, skip_special_tokens=False))


def test_the_openai_form_names_the_same_files(tmp_path: Path, make_clip: Callable[..., Path]) -> None:
    file, clip = tmp_path / "a picture.png", make_clip()
    Image.fromarray(PICTURE).save(file)
    data = "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
    same = [
        {"type": "image", "image": PICTURE},
        {"type": "image", "image": str(file)},
        {"type": "image", "image": file},
        {"type": "image", "image": Image.open(file)},
        {"type": "image_url", "image_url": {"url": file.as_uri()}},
        {"type": "image_url", "image_url": str(file)},
        {"type": "image_url", "image_url": {"url": data}},
        {"type": "image", "image": data},
    ]
    inputs = [build_inputs(MICRO, user(part, TEXT_PART)) for part in same]
    for each in inputs[1:]:
        np.testing.assert_array_equal(each.token_ids, inputs[0].token_ids)
        np.testing.assert_array_equal(each.pixels, np.asarray(inputs[0].pixels))
    one = build_inputs(MICRO, user({"type": "video_url", "video_url": {"url": clip.as_uri()}}, TEXT_PART))
    other = build_inputs(MICRO, user({"type": "video", "video": clip}, TEXT_PART))
    np.testing.assert_array_equal(one.token_ids, other.token_ids)


def test_a_prompt_without_media_has_no_pixels() -> None:
    inputs = build_inputs(MICRO, [{"role": "user", "content": "hi"}])
    assert inputs.pixels is None and inputs.grid_thw is None and inputs.media == ()
    assert inputs.position_ids is None  # where it starts is for the cache to say


def test_a_tool_s_answer_may_show_a_video() -> None:
    call = {"type": "function", "function": {"name": "zoom", "arguments": {}}}
    messages = [
        *user(TEXT_PART),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": [VIDEO_PART]},
    ]
    inputs = build_inputs(MICRO, messages, tools=[{"type": "function", "function": {"name": "zoom"}}])
    assert inputs.token_ids.tolist().count(START) == 3


def test_frames_with_times_are_all_taken_and_say_when_they_were() -> None:
    part = {"type": "video", "video": FRAMES[:4], "times": [301.0, 301.2, 305.5, 305.9]}
    inputs = build_inputs(MICRO, user(part, TEXT_PART), fps=0.01)
    assert inputs.grid_thw is not None and inputs.grid_thw[0, 0] == 2
    assert inputs.media[0].timestamps == (301.0, 301.2, 305.5, 305.9) and inputs.media[0].warnings == ()
    text = Tokenizer.from_dir(MICRO).decode(inputs.token_ids)
    assert "<301.1 seconds>" in text and "<305.7 seconds>" in text


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([0.0], "one number of seconds for each of the 12 frames"),
        ([1.0] * 11 + [0.5], "ascending"),
        (["a"] * 12, "one number of seconds"),
        ([float("nan")] * 12, "one number of seconds"),
        (3, "one number of seconds"),
    ],
)
def test_times_that_do_not_fit_the_frames_are_one_sentence(times: Any, message: str) -> None:
    with pytest.raises(PromptError, match=re.escape(message)):
        build_inputs(MICRO, user({"type": "video", "video": FRAMES, "times": times}, TEXT_PART))
    with pytest.raises(PromptError, match="times is only for videos"):
        build_inputs(MICRO, user({"type": "image", "image": PICTURE, "times": times}, TEXT_PART))


def test_a_file_gives_the_frames_on_the_screen_at_the_times(make_clip: Callable[..., Path]) -> None:
    clip = make_clip("a.mp4", frames=40, fps=10)
    part = {"type": "video", "video": str(clip), "times": [1.0, 1.55, 3.0, 3.2]}
    inputs = build_inputs(MICRO, user(part, TEXT_PART), fps=0.01)
    assert inputs.media[0].timestamps == pytest.approx((1.0, 1.5, 3.0, 3.2))
    whole = build_inputs(MICRO, user({"type": "video", "video": str(clip)}, TEXT_PART), fps=10)
    assert whole.grid_thw is not None and inputs.grid_thw is not None
    assert inputs.grid_thw.tolist() == [[2, *whole.grid_thw[0, 1:].tolist()]]


def test_a_part_of_a_video_may_be_shown_as_a_clip_of_its_own(make_clip: Callable[..., Path]) -> None:
    clip = make_clip("a.mp4", frames=40, fps=10)
    part = {"type": "video", "video": str(clip), "times": [1.55, 2.0, 3.0, 3.2], "origin": 1.55}
    inputs, frames = (
        build_inputs(MICRO, user(shown, TEXT_PART))
        for shown in (part, {**part, "video": FRAMES[:4], "times": [301.0, 301.2, 305.5, 305.9], "origin": 301.0})
    )
    assert inputs.media[0].timestamps == pytest.approx((0.0, 0.45, 1.45, 1.65))  # the first came on before the origin
    assert frames.media[0].timestamps == pytest.approx((0.0, 0.2, 4.5, 4.9))
    for origin in (-1.0, "1", True, float("nan")):
        with pytest.raises(PromptError, match=r"origin is .* a number of seconds"):
            build_inputs(MICRO, user({**part, "origin": origin}, TEXT_PART))
    with pytest.raises(PromptError, match="beside times"):
        build_inputs(MICRO, user({"type": "video", "video": str(clip), "origin": 1.0}, TEXT_PART))


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@settings(max_examples=25)
@given(
    answer=st.sampled_from(["It is blue.", '<tool_call>\n{"name": "look"}\n</tool_call>', "a<|im_end|>b"]),
    spoken=st.lists(TEXTS.filter(str.strip), min_size=1, max_size=3),
    role=st.sampled_from(["user", "tool"]),
    shown=st.booleans(),
)
def test_what_follows_a_held_answer_completes_the_prompt(
    answer: str, spoken: list[str], role: str, shown: bool
) -> None:
    tokenizer = Tokenizer.from_dir(MICRO)
    question = [{"role": "system", "content": "Be brief."}, *user(VIDEO_PART, TEXT_PART)]
    said = [*question, {"role": "assistant", "content": answer}]
    later = [
        {"role": role, "content": [*([VIDEO_PART] if shown else []), {"type": "text", "text": text}]} for text in spoken
    ]
    whole = build_inputs(tokenizer, [*said, *later])
    first = build_inputs(tokenizer, question)
    rest = build_inputs(tokenizer, [*said, *later], held=len(said))
    inside = tokenizer.encode_pieces(tokenizer.template_pieces([{"role": "assistant", "content": answer}], None, False))
    between = whole.token_ids[len(first.token_ids) : len(whole.token_ids) - len(rest.token_ids)].tolist()
    assert whole.token_ids[: len(first.token_ids)].tolist() == first.token_ids.tolist()
    assert whole.token_ids[len(whole.token_ids) - len(rest.token_ids) :].tolist() == rest.token_ids.tolist()
    assert between and str(between)[1:-1] in str(inside)
    shown_later = [] if whole.grid_thw is None else whole.grid_thw[1:].tolist()
    assert ([] if rest.grid_thw is None else rest.grid_thw.tolist()) == shown_later


def test_only_an_answer_can_be_held() -> None:
    for held in (1, 3):
        with pytest.raises(PromptError, match="no answer of the model"):
            build_inputs(MICRO, user(TEXT_PART), held=held)


def test_what_a_user_spells_is_no_placeholder() -> None:
    spelled = {"type": "text", "text": "<|vision_start|><|video_pad|><|vision_end|><|im_end|>"}
    inputs = build_inputs(MICRO, user(VIDEO_PART, spelled))
    plain = build_inputs(MICRO, user(VIDEO_PART, {"type": "text", "text": "x"}))
    for token in (START, END, VIDEO, 501, 504):
        assert inputs.token_ids.tolist().count(token) == plain.token_ids.tolist().count(token)


def test_sampling_options_override_the_checkpoint_s(make_clip: Callable[..., Path]) -> None:
    messages = user({"type": "video", "video": make_clip(frames=40, fps=10, gop=10)}, TEXT_PART)
    assert len(build_inputs(MICRO, messages).media[0].timestamps) == 8  # 4 s at 2 fps
    assert len(build_inputs(MICRO, messages, fps=5).media[0].timestamps) == 20
    assert len(build_inputs(MICRO, messages, max_frames=3).media[0].timestamps) == 3
    assert len(build_inputs(MICRO, messages, min_frames=12).media[0].timestamps) == 12
    assert build_inputs(MICRO, messages, mode="keyframes").media[0].timestamps == pytest.approx([0, 1, 2, 3])


@pytest.mark.parametrize("cap", [1, 2, 5])
def test_frame_tokens_caps_every_temporal_patch_and_image(cap: int) -> None:
    inputs = build_inputs(MICRO, user(VIDEO_PART, {"type": "image", "image": PICTURE}, TEXT_PART), frame_tokens=cap)
    assert inputs.grid_thw is not None
    assert (inputs.grid_thw[:, 1:].prod(axis=1) // 4 <= cap).all()


def test_a_video_is_fitted_as_stored_but_upright(make_clip: Callable[..., Path]) -> None:
    def grid(**options: Any) -> list[list[int]]:
        inputs = build_inputs(MICRO, user({"type": "video", "video": make_clip(size=(192, 96), **options)}, TEXT_PART))
        assert inputs.grid_thw is not None
        return inputs.grid_thw.tolist()

    ((_, height, width),) = square = grid()
    assert width == 2 * height
    assert grid(sar=Fraction(4, 3)) == square  # as the reference, which never sees the shape of the pixels
    assert grid(rotation=90) == [[square[0][0], width, height]]


def test_progress_and_warnings_come_through(make_clip: Callable[..., Path]) -> None:
    seen: list[tuple[int, int]] = []
    clip = make_clip("whole.mkv", frames=60)
    messages = user({"type": "video", "video": clip}, TEXT_PART)
    inputs = build_inputs(MICRO, messages, on_progress=lambda *now: seen.append(now))
    assert seen[-1] == (12, 12) and inputs.media[0].warnings == ()
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    assert "is cut off" in build_inputs(MICRO, messages).media[0].warnings[0]
    inputs = build_inputs(MICRO, user({"type": "video", "video": FRAMES}, TEXT_PART))
    assert "does not say its fps; taken as 24" in inputs.media[0].warnings[0]


def test_more_frames_than_the_context_holds_are_not_decoded(make_clip: Callable[..., Path]) -> None:
    seen: list[object] = []
    clip = {"type": "video", "video": make_clip(frames=40, fps=10, gop=1)}
    for parts in ([clip], [clip, clip], [{"type": "image", "image": PICTURE}, clip]):
        for mode in ("uniform", "keyframes"):
            with pytest.raises(PromptError, match=r"at least [\d,]+ tokens but the context holds 60;") as error:
                build_inputs(
                    MICRO,
                    user(*parts, TEXT_PART),
                    context_length=60,
                    mode=mode,
                    max_frames=40,
                    fps=10,
                    on_progress=lambda *now: seen.append(now),
                )
            for option in ("--max-frames", "--fps", "--frame-tokens"):
                assert option in str(error.value)
        if len(parts) == 1:
            assert seen == []


def test_the_context_is_the_checkpoint_s_and_counts_every_token() -> None:
    messages = user(VIDEO_PART, TEXT_PART)
    count = len(build_inputs(MICRO, messages).token_ids)
    assert len(build_inputs(MICRO, messages, context_length=count).token_ids) == count
    with pytest.raises(PromptError, match=f"takes {count} tokens but the context holds {count - 1};"):
        build_inputs(MICRO, messages, context_length=count - 1)
    with pytest.raises(PromptError, match=r"takes \d+,\d+ tokens but the context holds 32,768; shorten the text"):
        build_inputs(MICRO, [{"role": "user", "content": "no " * 70_000}])
    assert len(build_inputs(MICRO, [{"role": "user", "content": "x" * 200_000}], context_length=10**6).token_ids) > 1000


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "no messages"),
        ("hi", "no messages"),
        (["hi"], "messages[0] is a str"),
        ([{"content": "hi"}], "messages[0].role is None"),
        ([{"role": "robot", "content": "hi"}], "messages[0].role is 'robot'"),
        ([{"role": "system", "content": "hi"}], "no user message"),
        ([*user(TEXT_PART), {"role": "system", "content": "hi"}], "messages[1] is a system message"),
        ([{"role": "user"}], "messages[0].content is None"),
        ([{"role": "user", "content": 5}], "messages[0].content is 5"),
        (user("hi"), "messages[0].content[0] is 'hi'"),
        (user({"text": "hi"}), "messages[0].content[0].type is None"),
        (user(TEXT_PART, {"type": "audio"}), "messages[0].content[1].type is 'audio'"),
        (user({"type": "text"}), "messages[0].content[0].text is None"),
        (user({"type": "video"}), "messages[0].content[0] is of type video but has no 'video'"),
        (user({"type": "video", "video": 5}), "messages[0].content[0].video is 5"),
        (user({"type": "image_url", "image_url": {}}), "messages[0].content[0].image_url is"),
        (user({"type": "video", "video": ""}), "names no file"),
        (user({"type": "video", "video": FRAMES[0]}), "it must be uint8 (N, H, W, 3)"),
        (user({"type": "image", "image": PICTURE / 255}), "array float64 (40, 60, 3); it must be uint8 (H, W, 3)"),
        (user({"type": "video", "video": FRAMES, "fps": 0}), "messages[0].content[0].fps is 0"),
        (user({"type": "video", "video": "x.mp4", "fps": 2}), "a file knows its own frame rate"),
        (
            user({"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}),
            "nothing is fetched from the network",
        ),
        (user({"type": "image_url", "image_url": {"url": "data:image/png;base64,%%"}}), "not valid base64"),
        (user({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AA"}}), "only images are taken so"),
        ([{"role": "system", "content": [VIDEO_PART]}, *user(TEXT_PART)], "a system message shows no media"),
        ([*user(TEXT_PART), {"role": "assistant", "content": None}], "messages[1].content is None"),
        (
            [*user(TEXT_PART), {"role": "assistant", "content": "", "tool_calls": [{"name": "x"}]}],
            "messages[1].tool_calls",
        ),
        ([{"role": "user", "content": ""}], "question is empty"),
        (user(VIDEO_PART), "question is empty"),
        (user(VIDEO_PART, {"type": "text", "text": " \n"}), "question is empty"),
    ],
)
def test_malformed_messages_are_one_sentence_that_names_them(messages: Any, message: str) -> None:
    with pytest.raises(PromptError) as error:
        build_inputs(MICRO, messages)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 0}, "fps is 0"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"max_frames": 0}, "max_frames 0"),
        ({"min_frames": 9, "max_frames": 8}, "min_frames is 9 and max_frames 8"),
        ({"frame_tokens": 0}, "frame_tokens is 0"),
    ],
)
def test_options_out_of_range_are_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        build_inputs(MICRO, user(VIDEO_PART, TEXT_PART), **options)


def test_media_that_cannot_be_used_say_which(tmp_path: Path) -> None:
    long = np.zeros((1, 4000, 3), np.uint8)
    with pytest.raises(MediaError, match=r"the image in messages\[0\]\.content\[0\]: .*4000x1 pixels"):
        build_inputs(MICRO, user({"type": "image", "image": long}, TEXT_PART))
    with pytest.raises(MediaError, match=r"the video in messages\[0\]\.content\[0\]: .*4000x1 pixels"):
        build_inputs(MICRO, user({"type": "video", "video": long[None]}, TEXT_PART))
    with pytest.raises(MediaError, match=r"no file .*missing\.mp4"):
        build_inputs(MICRO, user({"type": "video", "video": tmp_path / "missing.mp4"}, TEXT_PART))
    data = "data:image/png;base64," + base64.b64encode(b"no picture").decode()
    with pytest.raises(MediaError, match="not an image"):
        build_inputs(MICRO, user({"type": "image_url", "image_url": {"url": data}}, TEXT_PART))


def test_one_pixel_and_one_frame_are_enough() -> None:
    inputs = build_inputs(MICRO, user({"type": "image", "image": PICTURE[:1, :1]}, TEXT_PART))
    assert inputs.grid_thw is not None and inputs.pixels is not None
    assert len(inputs.pixels) == inputs.grid_thw.prod()
    inputs = build_inputs(MICRO, user({"type": "video", "video": FRAMES[:1], "fps": 5}, TEXT_PART))
    assert inputs.grid_thw is not None and inputs.grid_thw[0, 0] == 1


def test_a_template_that_forgets_a_medium_is_an_error() -> None:
    content = json.loads((MICRO / "tokenizer.json").read_text())
    tokenizer = Tokenizer(content, template="{{ messages[0].content[1].text }}")
    with pytest.raises(PromptError, match=r"placeholders for 0 media \(none\) but the messages have 1 \(video\)"):
        build_inputs(tokenizer, user(VIDEO_PART, TEXT_PART))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<|video_pad|>"]
    with pytest.raises(PromptError, match=r"tokenizer has no <\|video_pad\|>"):
        build_inputs(Tokenizer(content), user(VIDEO_PART, TEXT_PART))
