"""Seed, kind of question and duration -> script.

- A short clip is one scene: four seconds in which what the question is about, the keys, happens.
- A long clip is many scenes. The keys happen in four-second blocks of one or a few of them, fillers everywhere else.
- No filler answers to what a question calls its keys. Where a shape is asked for, fillers may have it too, and where a
  colour is, that: else the answer would be the one thing that is nowhere else.
- A figure crosses the picture, or its quarter of it, exactly once: where it is tells how much of its span is over, so
  a span can be read more exactly than the sampled frames are apart.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Sequence

import numpy as np

from train.toyworld.script import (
    LONG_SECONDS,
    SHORT_SECONDS,
    SIZE,
    TICKS,
    Colour,
    Figure,
    Line,
    Scene,
    Script,
    Span,
    pick,
    random_of,
)
from train.toyworld.words import COLOURS, DIRECTIONS, FACTS, NAMES, SHAPES, Name

# kind of question -> how many keys it may have; count has a group of figures instead.
_KEYS: dict[str, tuple[int, ...]] = {
    "colour": (1,),
    "shape": (1,),
    "direction": (1,),
    "count": (0,),
    "order": (2, 3),
    "when": (1,),
    "before_after": (3,),
    "said": (2,),
    "rare": (1,),
    "absent": (1,),
}
KINDS = tuple(_KEYS)
MAX_COUNT = 4
RARE_SECONDS = 3.0

Ticks = tuple[int, int]

_BLOCK = round(SHORT_SECONDS * TICKS)
# Least and most ticks that a figure is there. Sampled twice a second, 8 show it in one frame or more, 12 in two, and 18
# in both of a temporal patch, which its direction needs. With longer spans, a constant answer would have a large IoU.
_ALONE = {"when": (8, 20), "rare": (round(RARE_SECONDS * TICKS),) * 2}
_ALONE_ELSE = (18, 32)
_IN_TURN = {2: (12, 18), 3: (12, 13)}  # by how many share a block
_AT_ONCE = (20, 36)
_FILLER = (12, 32)
_GROUP_OF_FILLERS = 0.3  # share of the scenes without keys

_FILM = 60 * TICKS
_SCENE, _FILM_SCENE = (50, 5), (120, 20)  # ticks: mean length, and how far a cut may move
_RADIUS, _GROUP_RADIUS = (9.0, 16.0), (8.0, 11.0)
_DARK, _BRIGHT = (0.08, 0.16), (0.24, 0.34)  # values of backgrounds, of 1
_MARGIN = 1.0  # pixels between a figure and the border of its picture or quarter


def make_script(seed: int, kind: str, duration: float = SHORT_SECONDS) -> Script:
    """The script of a clip in which a question of this kind can be asked; the same for the same arguments.

    kind: one of KINDS. duration: seconds, SHORT_SECONDS or any from LONG_SECONDS on.
    """
    ticks = round(duration * TICKS)
    if kind not in _KEYS or (ticks != _BLOCK and ticks < LONG_SECONDS * TICKS):
        raise ValueError(f"no script of {duration} s for the kind {kind!r}; kinds: {KINDS}")
    rng = random_of(seed, 0, KINDS.index(kind), ticks)
    scenes = _cut(rng, ticks)
    names = _key_names(rng, kind)
    fillers = _filler_names(what_is_asked(seed, kind), names)
    # Keys that must follow each other share a block; others lie as far apart as the scenes allow.
    together = len(scenes) == 1 or kind == "before_after" or not names
    shares = [names] if together else [(name,) for name in names]
    chosen = np.sort(rng.choice(len(scenes), len(shares), replace=False)).tolist()
    figures: list[Figure] = []
    keys: list[Figure] = []
    for index, (start, end) in enumerate(scenes):
        if index not in chosen:
            figures += _filler_scene(rng, (start, end), fillers, groups=kind != "count")
            continue
        block = int(rng.integers(start, end - _BLOCK + 1))
        acting = _block(rng, kind, block, shares[chosen.index(index)])
        keys += acting if names else []
        figures += [_alone(rng, block, pick(rng, fillers), _ALONE_ELSE)] if kind == "absent" else acting
        figures += _fill(rng, (start, block), fillers) + _fill(rng, (block + _BLOCK, end), fillers)
    figures.sort(key=lambda figure: figure.span)
    lines = _lines(rng, scenes, figures, keys if kind == "said" else [])
    return Script(seed, kind, ticks / TICKS, _backgrounds(rng, scenes), tuple(figures), tuple(keys), tuple(lines))


def still(seed: int) -> Script:
    """Two to four figures at once for a short clip's length, no shape and no colour twice: a picture at any time."""
    rng = random_of(seed, 8)
    number = int(rng.integers(2, MAX_COUNT + 1))
    colours, shapes = rng.permutation(list(COLOURS)).tolist(), rng.permutation(list(SHAPES)).tolist()
    names = [Name(colour, shape) for colour, shape in zip(colours, shapes, strict=False)][:number]
    quarters = rng.permutation(MAX_COUNT).tolist()
    scene = (0, _BLOCK)
    figures = [_cross(rng, name, scene, quarter) for name, quarter in zip(names, quarters, strict=False)]
    return Script(seed, "still", SHORT_SECONDS, _backgrounds(rng, [scene]), tuple(figures), (), ())


def what_is_asked(seed: int, kind: str) -> str:
    """The kind itself, but for a rare event one of its figure's colour, shape and direction."""
    return pick(random_of(seed, 3), ("colour", "shape", "direction")) if kind == "rare" else kind


def _cut(rng: np.random.Generator, ticks: int) -> list[Ticks]:
    """The scenes of a clip, none shorter than a block."""
    if ticks == _BLOCK:
        return [(0, ticks)]
    mean, spread = _SCENE if ticks < _FILM else _FILM_SCENE
    cuts = np.linspace(0, ticks, ticks // mean + 1).round().astype(int)
    cuts[1:-1] += rng.integers(-spread, spread + 1, len(cuts) - 2)
    return list(zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True))


def _key_names(rng: np.random.Generator, kind: str) -> tuple[Name, ...]:
    """Names of the keys in order of appearance, no colour twice."""
    number = pick(rng, _KEYS[kind])
    colours = rng.permutation(list(COLOURS))[:number].tolist()
    return tuple(Name(colour, pick(rng, SHAPES)) for colour in colours)


def _filler_names(asked: str, keys: Sequence[Name]) -> list[Name]:
    """Names that fillers may have."""
    if asked == "colour":
        return [name for name in NAMES if name.shape != keys[0].shape]
    colours = {name.colour for name in keys}
    shapes = {name.shape for name in keys} if asked == "absent" else set()
    return [name for name in NAMES if name.colour not in colours and name.shape not in shapes]


def _block(rng: np.random.Generator, kind: str, start: int, names: Sequence[Name]) -> list[Figure]:
    """What a question is about, within the block that begins at `start`."""
    if not names:
        return _group(rng, (start, start + _BLOCK), NAMES, int(rng.integers(1, MAX_COUNT + 1)))
    if len(names) == 1:
        return [_alone(rng, start, names[0], _ALONE.get(kind, _ALONE_ELSE))]
    lengths = rng.integers(*_IN_TURN[len(names)], len(names), endpoint=True)
    gaps = np.diff(np.sort(rng.integers(0, _BLOCK - lengths.sum(), len(names), endpoint=True)), prepend=0)
    starts = start + np.cumsum(gaps) + np.cumsum(lengths) - lengths
    spans = zip(starts.tolist(), (starts + lengths).tolist(), strict=True)
    return [_cross(rng, name, span) for name, span in zip(names, spans, strict=True)]


def _alone(rng: np.random.Generator, start: int, name: Name, lengths: Ticks) -> Figure:
    """A figure that is there for some part of the block that begins at `start`."""
    return _cross(rng, name, _within(rng, (start, start + _BLOCK), lengths))


def _within(rng: np.random.Generator, span: Ticks, lengths: Ticks) -> Ticks:
    """A part of a span, of least to most ticks."""
    length = int(rng.integers(*lengths, endpoint=True))
    start = int(rng.integers(span[0], span[1] - length, endpoint=True))
    return start, start + length


def _filler_scene(rng: np.random.Generator, span: Ticks, names: Sequence[Name], groups: bool) -> list[Figure]:
    if groups and rng.random() < _GROUP_OF_FILLERS:
        return _group(rng, span, names, int(rng.integers(2, MAX_COUNT + 1)))
    return _fill(rng, span, names)


def _fill(rng: np.random.Generator, span: Ticks, names: Sequence[Name]) -> list[Figure]:
    """Fillers one after the other, as many as the span takes."""
    figures: list[Figure] = []
    now, end = span
    while end - now >= _FILLER[0]:
        length = min(int(rng.integers(*_FILLER, endpoint=True)), end - now)
        figures.append(_cross(rng, pick(rng, names), (now, now + length)))
        now += length + int(rng.integers(0, TICKS))
    return figures


def _group(rng: np.random.Generator, span: Ticks, names: Sequence[Name], number: int) -> list[Figure]:
    """Figures that come and go together, each in its own quarter of the picture."""
    shared = _within(rng, span, _AT_ONCE)
    quarters = rng.permutation(MAX_COUNT)[:number].tolist()
    return [_cross(rng, pick(rng, names), shared, quarter) for quarter in quarters]


def _cross(rng: np.random.Generator, name: Name, span: Ticks, quarter: int | None = None) -> Figure:
    """A figure that crosses the picture, or one quarter of it, in the time of its span."""
    radius = float(rng.uniform(*(_RADIUS if quarter is None else _GROUP_RADIUS)))
    direction = pick(rng, tuple(DIRECTIONS))
    side = SIZE if quarter is None else SIZE // 2
    corner = np.array((0, 0) if quarter is None else (quarter % 2, quarter // 2)) * side
    reach = side / 2 - radius - _MARGIN  # from the middle
    forward = np.array(DIRECTIONS[direction], float)
    middle = corner + side / 2 + forward[::-1] * rng.uniform(-reach, reach)
    first, last = (middle - forward * reach).tolist(), (middle + forward * reach).tolist()
    return Figure(name, direction, radius, _seconds(span), ((first[0], first[1]), (last[0], last[1])))


def _lines(
    rng: np.random.Generator, scenes: Iterable[Ticks], figures: Sequence[Figure], told: Sequence[Figure]
) -> list[Line]:
    """One or two lines a scene about figures in it; of the figures `told`, the same fact with different values."""
    known: dict[tuple[Name, str], str] = {}  # what was said once stays true
    topic = pick(rng, tuple(FACTS))
    for figure, value in zip(told, rng.permutation(FACTS[topic].values), strict=False):
        known[figure.name, topic] = str(value)
    lines = []
    for start, end in scenes:
        here = [figure.name for figure in figures if start <= round(figure.span[0] * TICKS) < end]
        needed = [figure.name for figure in told if figure.name in here]
        others = [name for name in dict.fromkeys(here) if name not in needed]
        extra = max(int(rng.integers(1, 3)) - len(needed), 0)
        names = needed + [others[index] for index in rng.permutation(len(others))[:extra]]
        half = (end - start) // 2
        for part, index in enumerate(rng.permutation(len(names)).tolist()):
            name = names[index]
            fact = topic if name in needed else pick(rng, tuple(FACTS))
            value = known.setdefault((name, fact), pick(rng, FACTS[fact].values))
            span = _within(rng, (start + part * half, start + (part + 1) * half), (12, min(30, half)))
            text = FACTS[fact].statement.format(name=name, value=value)
            lines.append(Line(_seconds(span), name, fact, value, text))
    return lines


def _backgrounds(rng: np.random.Generator, scenes: Iterable[Ticks]) -> tuple[Scene, ...]:
    """Scenes with dark gradients. At every cut the hue jumps and the brightness changes, by more than a figure that
    comes or goes can change the picture: detectors of cuts can tell them apart."""
    hue, bright = rng.random(), bool(rng.integers(2))
    made = []
    for span in scenes:
        hue, bright = hue + rng.uniform(0.4, 0.6), not bright
        saturation, values = rng.uniform(0.5, 0.8), rng.uniform(*_BRIGHT if bright else _DARK, 2)
        top, bottom = (_rgb(hue, saturation, value) for value in values)
        made.append(Scene(_seconds(span), top, bottom))
    return tuple(made)


def _rgb(hue: float, saturation: float, value: float) -> Colour:
    red, green, blue = (round(255 * each) for each in colorsys.hsv_to_rgb(hue % 1, saturation, value))
    return red, green, blue


def _seconds(span: Ticks) -> Span:
    return span[0] / TICKS, span[1] / TICKS
