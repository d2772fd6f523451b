"""Samples: the trained tokens, against Hugging Face's assistant mask; positions, pixels, and rollouts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from ivcore.errors import PromptError
from ivcore.positions import position_ids
from ivcore.prompt import build_inputs
from ivcore.tokenizer import Tokenizer
from train.row import Row, parse_row
from train.samples import Framing, SampleBuilder

MICRO = Path(__file__).resolve().parents[1] / "data/reference/iv3-micro"
TOKENIZER = Tokenizer.from_dir(MICRO)
BUILDER = SampleBuilder(TOKENIZER)
IMAGE, VIDEO = 505, 506

# Hugging Face masks what a template puts between generation tags; ours is not told.
HF_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
)

# Words, so that no text is empty, and an answer does not begin or end with what a header's line break merges with.
WORDS = st.lists(st.text("abc 🙂日,.<|>\n", min_size=1, max_size=8), min_size=1, max_size=6).map("".join)
TEXT = WORDS.map(lambda text: f"x{text}x")


def row(messages: list[dict[str, Any]]) -> Row:
    return parse_row({"messages": messages}, Path(), "distill")


def turns(*texts: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


@pytest.fixture(scope="module")
def hugging_face() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(MICRO / "tokenizer.json"))


@settings(max_examples=30)
@given(st.lists(TEXT, min_size=2, max_size=6), st.booleans())
def test_the_trained_tokens_are_hugging_face_s_assistant_mask(
    hugging_face: PreTrainedTokenizerFast, texts: list[str], system: bool
) -> None:
    messages = [{"role": "system", "content": "Be brief."}] * system + turns(*texts)
    sample = BUILDER.sample(row(messages))
    expected = hugging_face.apply_chat_template(
        messages, chat_template=HF_TEMPLATE, return_dict=True, return_assistant_tokens_mask=True
    )
    assert sample.token_ids.tolist() == expected["input_ids"]
    assert sample.trained.tolist() == [bool(each) for each in expected["assistant_masks"]]
    assert len(sample) == sample.position_ids.shape[1] and sample.position_ids.dtype == np.int32
    assert (sample.position_ids == np.arange(len(sample))).all()  # text counts up along all three axes


def test_what_is_trained_reads_as_the_answers_with_their_ends() -> None:
    sample = BUILDER.sample(row(turns("Hello?", "I am here.", "Where?", "Here.")))
    assert TOKENIZER.decode(sample.token_ids[sample.trained], skip_special_tokens=False) == (
        "I am here.<|im_end|>Here.<|im_end|>"
    )


def test_a_message_of_weight_0_is_read_and_not_trained() -> None:
    messages = turns("Hello?", "I am here.", "Where?", "Here.")
    unlearned = [messages[0], {**messages[1], "weight": 0}, messages[2], {**messages[3], "weight": 1}]
    sample, whole = BUILDER.sample(row(unlearned)), BUILDER.sample(row(messages))
    assert sample.token_ids.tolist() == whole.token_ids.tolist()
    assert TOKENIZER.decode(sample.token_ids[sample.trained], skip_special_tokens=False) == "Here.<|im_end|>"
    with pytest.raises(PromptError, match="no assistant message to learn from"):
        BUILDER.sample(row([messages[0], {**messages[1], "weight": 0}]))


def test_media_before_between_and_after_answers_shift_nothing(make_clip: Callable[..., Path], tmp_path: Path) -> None:
    clip = make_clip(frames=12, fps=4, size=(64, 64))
    video = {"type": "video", "video": str(clip)}
    picture = {"type": "image", "image": np.zeros((64, 96, 3), np.uint8)}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "now "}, video, {"type": "text", "text": "A?"}]},
        {"role": "assistant", "content": "The first."},
        {"role": "user", "content": [picture, video, {"type": "text", "text": "And the second?"}]},
        {"role": "assistant", "content": "The second."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    sample = BUILDER.sample(row(messages))
    inputs = build_inputs(MICRO, messages, add_generation_prompt=False)
    assert sample.token_ids.tolist() == inputs.token_ids.tolist()
    assert sample.grid_thw is not None and inputs.grid_thw is not None and sample.pixels is not None
    np.testing.assert_array_equal(sample.grid_thw, inputs.grid_thw)
    np.testing.assert_array_equal(np.asarray(sample.pixels), np.asarray(inputs.pixels))
    assert sample.grid_thw[:, 0].tolist() == [3, 1, 3] and np.isin([IMAGE, VIDEO], sample.token_ids).all()
    # Independently: the tokens of each answer occur once, where they are trained.
    runs = np.split(np.flatnonzero(sample.trained), np.flatnonzero(np.diff(np.flatnonzero(sample.trained)) > 1) + 1)
    texts = [TOKENIZER.decode(sample.token_ids[run], skip_special_tokens=False) for run in runs]
    assert texts == [f"{text}<|im_end|>" for text in ("The first.", "The second.", "Yes.")]
    expected = position_ids(inputs.token_ids, inputs.grid_thw, image_token_id=IMAGE, video_token_id=VIDEO, merge_size=2)
    np.testing.assert_array_equal(sample.position_ids, expected)


def test_the_framing_says_how_videos_are_sampled_and_how_long_a_sample_may_be(make_clip: Callable[..., Path]) -> None:
    clip = make_clip(frames=20, fps=10, size=(128, 96))
    messages = [{"role": "user", "content": [{"type": "video", "video": str(clip)}, {"type": "text", "text": "?"}]}]
    only = row([*messages, {"role": "assistant", "content": "A."}])
    sample = SampleBuilder(TOKENIZER, Framing(fps=5, max_frames=6, frame_tokens=2)).sample(only)
    assert sample.grid_thw is not None
    assert sample.grid_thw[0, 0] == 3 and sample.grid_thw.prod() // 4 <= 3 * 2
    with pytest.raises(PromptError, match="context holds 40"):
        SampleBuilder(TOKENIZER, Framing(max_tokens=40)).sample(only)


def test_a_rollout_keeps_the_very_tokens_that_were_sampled() -> None:
    asked = row(turns("Where?", "Dropped: the prompt ends before the last answer."))
    prompt = BUILDER.prompt(asked)
    assert TOKENIZER.decode(prompt.token_ids) == "user\nWhere?\nassistant\n"
    letters = [TOKENIZER.encode(letter)[0] for letter in "the"]  # as text, "the" is fewer tokens
    assert TOKENIZER.encode("the") != letters
    sample = BUILDER.rollout(asked.id, prompt, letters)
    assert sample.token_ids.tolist() == [*prompt.token_ids.tolist(), *letters]
    assert np.flatnonzero(sample.trained).tolist() == list(range(len(prompt.token_ids), len(sample)))
    assert sample.row_id == asked.id and sample.position_ids[:, -1].tolist() == [len(sample) - 1] * 3


def test_a_rollout_is_the_sample_of_its_text_where_the_tokens_agree(make_clip: Callable[..., Path]) -> None:
    video = {"type": "video", "video": str(make_clip(frames=8, fps=4, size=(64, 64)))}
    asked = row([{"role": "user", "content": [video, {"type": "text", "text": "What?"}]}, turns("", "A ball.")[1]])
    rollout = BUILDER.rollout(asked.id, BUILDER.prompt(asked), TOKENIZER.encode("A ball.<|im_end|>"))
    sample = BUILDER.sample(asked)
    length = len(rollout)
    assert len(sample) == length + len(TOKENIZER.encode("\n"))  # the line break that only the template writes
    for name in ("token_ids", "trained", "position_ids"):
        np.testing.assert_array_equal(getattr(rollout, name), getattr(sample, name)[..., :length])


def template_builder(tmp_path: Path, template: str) -> SampleBuilder:
    folder = tmp_path / "model"
    shutil.copytree(MICRO, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.npz"))
    (folder / "chat_template.jinja").write_text(template)
    return SampleBuilder(Tokenizer.from_dir(folder))


@pytest.mark.parametrize(("end", "trained"), [("<|endoftext|>", "<|endoftext|>"), ("(end)", "(end)\n")])
def test_another_template_with_another_end_is_followed(tmp_path: Path, end: str, trained: str) -> None:
    template = (
        "{% for m in messages %}{{ '[A]' if m.role == 'assistant' else '[U]' }}{{ m.content }}"
        f"{end}{{{{ '\\n' }}}}{{% endfor %}}{{% if add_generation_prompt %}}[A]{{% endif %}}"
    )
    builder = template_builder(tmp_path, template)
    sample = builder.sample(row(turns("one", "two", "three", "four")))
    text = TOKENIZER.decode(sample.token_ids, skip_special_tokens=False)
    assert text == f"[U]one{end}\n[A]two{end}\n[U]three{end}\n[A]four{end}\n"
    # Where no token ends an answer, all that the template writes does.
    assert TOKENIZER.decode(sample.token_ids[sample.trained], False) == f"two{trained}four{trained}"


@pytest.mark.parametrize(
    "template",
    [
        # Forgets the thoughts of earlier turns, as templates of thinking models do.
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if loop.last else m.content.split('.')[-1] }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        # Writes a header for generation that the conversation itself does not have.
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}",
    ],
)
def test_a_template_that_rewrites_the_past_is_an_error(tmp_path: Path, template: str) -> None:
    with pytest.raises(PromptError, match=r"messages\[1\]: the chat template writes what comes before it differently"):
        template_builder(tmp_path, template).sample(row(turns("One?", "I think. 1", "Two?", "I think. 2")))


def test_an_answer_that_merges_with_its_header_is_an_error(tmp_path: Path) -> None:
    header = "{% for m in messages %}<|im_start|>t{{ m.content }}<|im_end|>{% endfor %}"
    builder = template_builder(tmp_path, header + "{% if add_generation_prompt %}<|im_start|>t{% endif %}")
    assert len(TOKENIZER.encode("the")) < len(TOKENIZER.encode("t") + TOKENIZER.encode("he"))
    builder.sample(row(turns("x", "x")))
    with pytest.raises(PromptError, match=r"messages\[1\]"):
        builder.sample(row(turns("x", "he")))


def test_tools_stand_in_the_prompt_and_change_nothing_about_what_is_trained() -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    messages = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}]
    builder = SampleBuilder(Tokenizer.from_dir(MICRO))
    without, offered = (
        builder.sample(parse_row({"messages": messages, **extra}, Path(), "sft")) for extra in ({}, {"tools": [tool]})
    )
    assert offered.token_ids[offered.trained].tolist() == without.token_ids[without.trained].tolist()
    rendered = Tokenizer.from_dir(MICRO).apply_template(messages, [tool], False)
    assert offered.token_ids.tolist() == Tokenizer.from_dir(MICRO).encode(rendered)


def test_a_conversation_without_an_answer_is_an_error() -> None:
    with pytest.raises(PromptError, match="no assistant message"):
        BUILDER.sample(row(turns("Hi?")))
