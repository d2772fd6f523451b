"""Speech recognition: the real packages run a tiny Whisper whose weights are set so that it says two words."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from agent.tools.tool import call
from agent.tools.transcribe import Transcript as TranscriptTool
from agent.transcript import speech
from agent.transcript.speech import SAMPLE_RATE, load_recogniser, sound, speech_track
from agent.transcript.transcript import Transcript, transcript
from agent.workspace import Workspace
from ivcore.demux import read_index
from ivcore.errors import BackendError, CheckpointError

SAYS = (("Hello", 0.2, 0.8), ("there", 0.8, 1.4))  # and the seconds that the model gives for it
SPECIAL = ("endoftext", "startoftranscript", "en", "translate", "transcribe", "startoflm", "startofprev", "nospeech")


def voice(seconds: float) -> np.ndarray:
    """float32 (samples,): something like a vowel, four syllables a second, that a voice detector takes for speech."""
    count = round(seconds * SAMPLE_RATE)
    time = np.arange(count) / SAMPLE_RATE
    phase = np.cumsum(120 * (1 + 0.05 * np.sin(2 * np.pi * 2.3 * time))) / SAMPLE_RATE
    pulses = np.diff(np.floor(phase), prepend=0.0)
    ring = np.arange(800) / SAMPLE_RATE  # the impulse response of a formant: a damped wave
    total = np.zeros(count)
    for formant, width in ((700, 80), (1200, 90), (2600, 120)):
        wave = np.convolve(pulses, np.exp(-np.pi * width * ring) * np.sin(2 * np.pi * formant * ring))[:count]
        total += wave / np.abs(wave).max()
    return (0.25 * total * (0.55 - 0.45 * np.cos(2 * np.pi * 4 * time))).astype(np.float32)


def silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * SAMPLE_RATE), np.float32)


def film(
    path: Path, *parts: tuple[float, np.ndarray], seconds: int = 6, start: float = 0.0, rate: int = 16_000
) -> Path:
    """A video with parts of sound that begin at those seconds, as 16-bit PCM; no audio stream without a part."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=10)
        video.width = video.height = 32
        audio = container.add_stream("pcm_s16le", rate=rate, layout="mono") if parts else None
        for index in range(10 * seconds):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), index % 256, np.uint8), format="rgb24")
            frame.time_base, frame.pts = Fraction(1, 10), index + round(10 * start)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        for begin, samples in parts:
            for place in range(0, len(samples), 1600):
                block = np.rint(samples[None, place : place + 1600] * 32767).astype(np.int16)
                piece = av.AudioFrame.from_ndarray(block, format="s16", layout="mono")
                piece.sample_rate, piece.time_base = rate, Fraction(1, rate)
                piece.pts = place + round((begin + start) * rate)
                assert audio is not None
                container.mux(audio.encode(piece))
        if audio is not None:
            container.mux(audio.encode(None))
    return path


def spans(said: Transcript) -> list[tuple[float, float]]:
    return [line.span for line in said.lines]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a Whisper of one layer and width 64 that says SAYS, whatever it hears.

    Every layer adds nothing, and what the decoder knows is its position: the position before a token has that token's
    embedding, a vector of 64 signs, so its logit is 64 where the others' are some 8 on average.
    """
    pytest.importorskip("faster_whisper")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    from ctranslate2.converters import TransformersConverter
    from tokenizers import decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("whisper")
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = [f"<|{name}|>" for name in (*SPECIAL, "notimestamps")]
    tokenizer.add_special_tokens(names)
    tokenizer.add_tokens([f"<|{0.02 * step:.2f}|>" for step in range(1501)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))

    end, begin = tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|startoftranscript|>")
    config = transformers.WhisperConfig(
        vocab_size=tokenizer.get_vocab_size(), d_model=64, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
        pad_token_id=end, bos_token_id=end, eos_token_id=end, decoder_start_token_id=begin,
    )  # fmt: skip
    whisper = transformers.WhisperForConditionalGeneration(config)
    said = "".join(f"<|{first:.2f}|>{word}<|{last:.2f}|>" for word, first, last in SAYS)
    script = tokenizer.encode(f"{said}<|endoftext|>").ids
    signs = torch.tensor(
        np.random.default_rng(0).permuted(np.tile([1.0, -1.0], (config.vocab_size, 32)), axis=1)
    ).float()
    with torch.no_grad():
        for name, parameter in whisper.named_parameters():
            if "out_proj" in name or "fc2" in name:
                parameter.zero_()
        whisper.model.decoder.embed_tokens.weight.copy_(signs)
        whisper.model.decoder.embed_positions.weight.copy_(100 * signs[end])
        whisper.model.decoder.embed_positions.weight[: len(script)] = 100 * signs[script]
    whisper.generation_config.suppress_tokens = whisper.generation_config.begin_suppress_tokens = []
    whisper.generation_config.alignment_heads = [[0, 0]]
    whisper.save_pretrained(folder)
    converter = TransformersConverter(str(folder), copy_files=["tokenizer.json"])
    converter.convert(str(folder / "converted"))
    load_recogniser.cache_clear()
    yield folder / "converted"
    load_recogniser.cache_clear()


def test_what_is_said_comes_with_the_pictures_seconds(tmp_path: Path, model: Path) -> None:
    vad = pytest.importorskip("faster_whisper.vad")
    samples = np.concatenate([silence(2), voice(2), silence(1)])
    (chunk,) = vad.get_speech_timestamps(samples, vad.VadOptions())
    begin = chunk["start"] / SAMPLE_RATE  # the model's times count from where the voice detector has speech begin
    assert 1 < begin < 2.2
    for start in (0.0, 3.7):
        said = transcript(film(tmp_path / f"{start}.mkv", (0.5, samples), start=start), speech_model=model)
        assert [(line.text, line.source) for line in said.lines] == [("Hello", "speech"), ("there", "speech")]
        assert spans(said) == [pytest.approx((0.5 + begin + a, 0.5 + begin + b), abs=0.02) for _, a, b in SAYS]
        assert said.source == "speech"
        assert said.origin == f"speech recognised in {start}.mkv with {model}"
        assert len(said.notes) == 2  # no stream, no file beside it


def test_the_transcript_tool_hears_with_the_model_that_its_workspace_names(tmp_path: Path, model: Path) -> None:
    path = film(tmp_path / "film.mkv", (0.0, np.concatenate([voice(2), silence(2), voice(2)])))
    workspace = Workspace(path, None, None, speech_model=str(model))  # type: ignore[arg-type]  # no video model is asked
    shown = call(TranscriptTool(workspace), {"start": 4.0})
    assert [line.partition(": ")[2] for line in shown.quoted] == ["Hello", "there"]
    assert shown.span == (4.0, 6.0) and shown.is_evidence
    nothing = call(TranscriptTool(workspace), {"start": 2.5, "end": 3.5})
    assert nothing.quoted[-1] == "No speech was recognised in film.mkv from 2.5 to 3.5 s." and not nothing.is_evidence


def test_only_the_span_is_heard(tmp_path: Path, model: Path) -> None:
    path = film(tmp_path / "film.mkv", (0.0, np.concatenate([voice(2), silence(2), voice(2)])))
    seen: list[tuple[float, float]] = []
    early = transcript(path, (0.0, 2.0), speech_model=model, on_progress=lambda *at: seen.append(at))
    assert spans(early) == [pytest.approx((first, last), abs=0.05) for _, first, last in SAYS]
    assert seen[-1] == (2.0, 2.0)
    middle = transcript(path, (2.5, 3.5), speech_model=model)
    assert (middle.lines, middle.source) == ((), None)
    assert middle.notes[-1] == "No speech was recognised in film.mkv from 2.5 to 3.5 s."
    late = transcript(path, (4.0, 6.0), speech_model=model)
    assert spans(late) == [pytest.approx((4 + first, 4 + last), abs=0.05) for _, first, last in SAYS]


def test_long_sound_is_heard_in_pieces_each_at_its_own_time(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = film(tmp_path / "film.mkv", (0.0, np.concatenate([voice(2), silence(1), voice(3)])))
    monkeypatch.setattr(speech, "PIECE_SECONDS", 3.5)
    monkeypatch.setattr(speech, "QUIET_SECONDS", 1)
    lines = transcript(path, speech_model=model).lines
    assert [line.span[0] for line in lines[::2]] == pytest.approx([0.2, 2.55 + 0.2], abs=0.5)


def test_a_video_without_sound_or_with_nobody_speaking_is_an_answer(tmp_path: Path, model: Path) -> None:
    mute = transcript(film(tmp_path / "mute.mkv"), speech_model=tmp_path / "no such model is asked for")
    assert (mute.lines, mute.notes[-1]) == ((), "mute.mkv has no sound.")
    still = transcript(film(tmp_path / "still.mkv", (0.0, silence(3))), speech_model=model)
    assert (still.lines, still.notes[-1]) == ((), "No speech was recognised in still.mkv.")
    over = transcript(tmp_path / "still.mkv", (4.0, 5.0), speech_model=model)
    assert over.notes[-1] == "still.mkv has no sound from 4 to 5 s."


def test_a_language_that_whisper_does_not_know_is_said(tmp_path: Path) -> None:
    pytest.importorskip("faster_whisper")
    path = film(tmp_path / "film.mkv", (0.0, voice(1)), seconds=1)

    def recognise(samples: np.ndarray, language: str | None) -> Iterator[tuple[float, float, str]]:
        from faster_whisper.tokenizer import Tokenizer

        raise AssertionError(Tokenizer(None, True, "transcribe", language))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speech, "load_recogniser", lambda model: recognise)
        with pytest.raises(BackendError, match=r"^Speech recognition failed \('?xx.*\)\.$"):
            speech_track(path, read_index(path), (0.0, 1.0), "small", language="xx")


def test_subtitles_spare_the_recognition(tmp_path: Path) -> None:
    path = film(tmp_path / "film.mkv", (0.0, voice(1)))
    path.with_suffix(".srt").write_text("1\n00:00:01,000 --> 00:00:02,000\nHi.\n")
    assert transcript(path, speech_model="no such model is asked for").source == "sidecar"


def test_sound_is_what_faster_whisper_decodes_and_a_span_of_it_is_a_part_of_the_whole(tmp_path: Path) -> None:
    audio = pytest.importorskip("faster_whisper.audio")
    path = film(tmp_path / "film.mkv", (0.0, voice(6)), rate=24_000)  # as long as 4 s of 24 kHz
    index = read_index(path)
    ((begin, whole),) = sound(path, index, (0.0, 6.0))
    expected = audio.decode_audio(str(path))
    assert begin == 0 and whole.dtype == np.float32 and abs(len(whole) - len(expected)) < 100
    np.testing.assert_allclose(whole, expected[: len(whole)], atol=1e-4)
    ((begin, part),) = sound(path, index, (2.0, 3.5))
    assert begin == pytest.approx(2.0, abs=1e-3) and abs(len(part) - 24_000) < 2
    np.testing.assert_allclose(part[100:-100], whole[32_100 : 32_000 + len(part) - 100], atol=1e-2)


def test_pieces_join_to_the_whole_and_end_where_it_is_quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = np.concatenate([voice(1.5), silence(0.5), voice(4)])
    path = film(tmp_path / "film.mkv", (0.0, samples))
    index = read_index(path)
    monkeypatch.setattr(speech, "PIECE_SECONDS", 2.2)
    monkeypatch.setattr(speech, "QUIET_SECONDS", 1)
    pieces = list(sound(path, index, (0.0, 6.0)))
    assert len(pieces) > 2 and 1.5 < pieces[1][0] < 2.0
    joined = np.concatenate([piece for _, piece in pieces])
    np.testing.assert_allclose(joined, samples[: len(joined)], atol=1e-4)
    assert len(samples) - len(joined) < 100
    lengths = np.cumsum([0] + [len(piece) for _, piece in pieces[:-1]]) / SAMPLE_RATE
    assert [begin for begin, _ in pieces] == pytest.approx(lengths.tolist())


def test_sound_after_a_gap_keeps_its_time(tmp_path: Path) -> None:
    path = film(tmp_path / "film.mkv", (0.5, voice(1)), (3.0, voice(1)), start=2.0)
    pieces = list(sound(path, read_index(path), (0.0, 6.0)))
    assert [begin for begin, _ in pieces] == pytest.approx([0.5, 3.0], abs=1e-3)
    assert [len(piece) for _, piece in pieces] == pytest.approx([SAMPLE_RATE] * 2, abs=100)


def test_a_missing_package_is_one_sentence_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = film(tmp_path / "film.mkv", (0.0, voice(1)), seconds=1)
    monkeypatch.setattr(speech, "find_spec", lambda name: None)
    load_recogniser.cache_clear()
    sentence = "Speech recognition needs faster-whisper or mlx-whisper: run pip install 'ivmlx[speech]'."
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(BackendError) as caught:
        speech_track(path, read_index(path), (0.0, 1.0), "small")
    assert str(caught.value) == sentence
    said = transcript(path, speech_model="small")
    assert (said.lines, said.notes[-1]) == ((), sentence)


@pytest.mark.parametrize("kind", ["missing", "empty", "damaged", "file"])
def test_a_model_that_is_none_is_one_sentence(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "model"
    if kind == "file":
        folder.touch()
    elif kind != "missing":
        folder.mkdir()
    if kind == "damaged":
        pytest.importorskip("faster_whisper")
        (folder / "model.bin").write_bytes(b"not a model")
        (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"^[^\n]*\.$") as caught:
        load_recogniser(str(folder))
    assert str(folder) in str(caught.value)
