"""The subtitles that a video brings along: its text streams, and .srt and .vtt files beside it."""

from __future__ import annotations

import re
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

from av.container import InputContainer
from av.stream import Discard, Disposition
from av.subtitles.stream import SubtitleStream

from agent.transcript.cues import Cue, Markup, Track, lines_of, parse, plain
from ivcore.demux import DAMAGE, PacketIndex, open_video
from ivcore.errors import BackendError, MediaError
from ivcore.media_file import readable_file

SIDECARS = (".srt", ".vtt")
# The packets of these codecs are the text itself; those of the others are pictures or need a decoder that loses text.
TEXT_CODECS: dict[str, Markup] = {
    "subrip": "srt",
    "srt": "srt",
    "text": "none",
    "mov_text": "none",
    "webvtt": "vtt",
    "ass": "ass",
    "ssa": "ass",
}
# Greek, Cyrillic, Hebrew or Arabic letters beside Latin ones, and among themselves. The few accents of French or
# Italian make a detector think of Cyrillic, and déjà becomes "dйjа".
_MIXED = re.compile("[A-Za-z][\u0370-\u06ff]|[\u0370-\u06ff][A-Za-z]")
_UNMIXED = re.compile("[\u0370-\u06ff]{2}")
MAX_FILE_BYTES = 16 << 20  # the subtitles of a film take some 200 kB

# After the video's name: nothing, or one or two words such as a language (.en, .pt-BR, .en.forced).
_LANGUAGE = re.compile(r"(\.[a-z]{2,12}([-_][a-z0-9]{2,8})*){0,2}", re.I)


def stream_track(path: Path, index: PacketIndex) -> Track:
    """The lines of a video's first text stream that has any: its default one before the others, forced ones last."""
    container, video = open_video(path)
    notes: list[str] = []
    with container:
        streams = list(container.streams.subtitles)
        if not streams:
            return Track((), "", (f"{path.name} has no subtitle stream.",))
        video.discard = Discard.all
        streams.sort(key=lambda stream: (_is(stream, Disposition.forced), not _is(stream, Disposition.default)))
        for number, stream in enumerate(streams):
            markup = TEXT_CODECS.get(_codec(stream))
            origin = f"subtitle stream {stream.index} of {path.name} ({_describe(stream)})"
            if markup is None:
                notes.append(f"The {origin} is not stored as text, so it was not read.")
                continue
            cues, broken = _stream_cues(container, stream, first_seconds(index))
            lines, said = lines_of(cues, broken, markup, "stream", index.seconds, f"The {origin}")
            notes += said
            if lines:
                if rest := len(streams) - number - 1:
                    notes.append(f"{path.name} has {rest} more subtitle stream{'s' * (rest > 1)}, not read.")
                return Track(lines, origin, tuple(notes))
    return Track((), "", tuple(notes))


def sidecar_track(path: Path, seconds: float) -> Track:
    """The lines of the first subtitle file beside a video of that many seconds that has any."""
    files = sidecars(path)
    if not files:
        return Track((), "", (f"There is no .srt or .vtt file for {path.name} beside it.",))
    notes: list[str] = []
    for number, file in enumerate(files):
        track = read_file(file, seconds)
        notes += track.notes
        if track.lines:
            if rest := ", ".join(other.name for other in files[number + 1 :]):
                notes.append(f"Beside {path.name}, not read: {rest}.")
            return Track(track.lines, track.origin, tuple(notes))
    return Track((), "", tuple(notes))


def sidecars(path: Path) -> list[Path]:
    """The subtitle files that belong to a video: film.srt, then film.en.srt, other languages, and forced ones last."""
    try:
        entries = sorted(path.absolute().parent.iterdir())
    except OSError:
        return []
    others = {entry.stem for entry in entries if entry.suffix.lower() not in SIDECARS} - {path.stem}
    found = []
    for entry in entries:
        if entry.suffix.lower() not in SIDECARS or not entry.stem.startswith(path.stem) or entry.stem in others:
            continue
        rest = entry.stem.removeprefix(path.stem)
        if _LANGUAGE.fullmatch(rest):
            words = rest.lower().split(".")
            found.append(("forced" in words, rest != "", "en" not in words, entry.name, entry))
    return [entry for *_, entry in sorted(found)]


def read_file(path: Path, seconds: float) -> Track:
    """The lines of one .srt or .vtt file of a video that lasts `seconds`; what is wrong with it is said in `notes`."""
    try:
        with readable_file(path).open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except (MediaError, OSError) as error:
        return Track((), "", (str(error),))
    notes = []
    if len(content) > MAX_FILE_BYTES:
        content = content[:MAX_FILE_BYTES]
        notes.append(f"{path.name} is longer than any subtitles; only its first {MAX_FILE_BYTES >> 20} MiB were read.")
    text = decode_text(content)
    if text is None:
        return Track((), "", (*notes, f"{path.name} is not text, so it was not read."))
    markup: Markup = "vtt" if text.lstrip().startswith("WEBVTT") else "srt"
    lines, said = lines_of(*parse(text, markup), markup, "sidecar", seconds, path.name)
    return Track(lines, path.name, (*notes, *said))


def decode_text(content: bytes) -> str | None:
    """`content` as text, whatever its encoding; None if it is no text.

    A byte order mark decides; then whether it is UTF-8, of which a tenth may be spoilt; else chardet guesses among the
    encodings that the web uses, unless its guess mixes alphabets within words: then it is Western. Raises BackendError
    where chardet is needed and missing.
    """
    for mark, encoding in ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if content.startswith(mark):
            return content.decode(encoding, errors="replace").removeprefix("\ufeff")
    zeros = 0 in content
    if not zeros:
        text = content.decode("utf-8", errors="replace")
        foreign = len(text) - len(text.encode("ascii", errors="ignore"))
        if text.count("\ufffd") * 10 <= foreign:
            return text
    try:
        import chardet
    except ImportError:
        raise BackendError("Guessing a subtitle's encoding needs chardet: run pip install 'ivmlx[agent]'.") from None
    guess = chardet.detect(content, encoding_era=chardet.EncodingEra.MODERN_WEB)["encoding"]
    if guess is None or (zeros and not guess.upper().startswith(("UTF-16", "UTF-32"))):
        return None
    text = content.decode(guess, errors="replace")
    mixed = len(_MIXED.findall(text)) > len(_UNMIXED.findall(text))
    return content.decode("cp1252", errors="replace") if mixed else text


def first_seconds(index: PacketIndex) -> Fraction:
    """The time of a video's first frame in its container, from which ivcore.video counts."""
    return int(index.frame_pts[0]) * index.time_base if index.seekable else Fraction(0)


def _stream_cues(container: InputContainer, stream: SubtitleStream, zero: Fraction) -> tuple[list[Cue], int]:
    """A stream's cues, in seconds after `zero`, and how many are broken."""
    stream.discard = Discard.default
    timings: list[tuple[float, float | None]] = []
    payloads: list[bytes] = []
    broken = 0
    with suppress(*DAMAGE):  # what was read before the damage counts
        container.seek(0)
        for packet in container.demux(stream):
            if packet.size == 0:
                continue
            if packet.pts is None or packet.time_base is None:
                broken += 1
                continue
            start = packet.pts * packet.time_base - zero
            end = float(start + packet.duration * packet.time_base) if packet.duration else None
            timings.append((float(start), end))
            payloads.append(_payload(bytes(packet), _codec(stream)).replace(b"\n", b"\v"))
    stream.discard = Discard.all
    # One encoding for the whole stream: a muxer that did not convert the text converted none of it.
    texts = (decode_text(b"\n".join(payloads)) or "").split("\n")
    if len(texts) != len(payloads):
        return [], broken + len(payloads)
    return [Cue(start, end, text) for (start, end), text in zip(timings, texts, strict=True)], broken


def _payload(content: bytes, codec: str) -> bytes:
    """A packet's text."""
    if codec == "mov_text":  # 16 bits of length, then UTF-8 or, after a mark, UTF-16 (3GPP TS 26.245, 5.17)
        text = content[2 : 2 + int.from_bytes(content[:2], "big")]
        return text.decode("utf-16", errors="replace").encode() if text[:2] in (b"\xff\xfe", b"\xfe\xff") else text
    if codec in ("ass", "ssa"):  # order, layer, style, name, three margins, effect, text
        return content.split(b",", 8)[-1]
    return content


def _codec(stream: SubtitleStream) -> str:
    return stream.codec_context.name if stream.codec_context else "unknown codec"


def _is(stream: SubtitleStream, disposition: Disposition) -> bool:
    return bool(stream.disposition & disposition)


def _describe(stream: SubtitleStream) -> str:
    language = plain(stream.metadata.get("language", ""))[:20]
    return f"{_codec(stream)}, {language}" if language and language != "und" else _codec(stream)
