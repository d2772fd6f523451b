"""What the world is made of: colours, shapes, directions, and the facts that only subtitles tell."""

from __future__ import annotations

from typing import NamedTuple

# RGB, bright against backgrounds that are all dark, and far apart after 4:2:0 subsampling.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (230, 35, 35),
    "green": (40, 190, 60),
    "blue": (55, 95, 255),
    "yellow": (245, 220, 40),
    "purple": (190, 60, 220),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y)


class Name(NamedTuple):
    """A colour and a shape: what figures are called by."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


NAMES = tuple(Name(colour, shape) for colour in COLOURS for shape in SHAPES)


class Fact(NamedTuple):
    """Something said about a figure: how it is stated, how one asks for it, and what it may be."""

    statement: str
    questions: tuple[str, ...]
    values: tuple[str, ...]


FACTS: dict[str, Fact] = {
    "food": Fact(
        "The {name} likes {value}.",
        ("What does the {name} like?", "What does the {name} like to eat or drink?"),
        ("plums", "figs", "nuts", "rice", "tea", "milk", "corn", "soup"),
    ),
    "town": Fact(
        "The {name} lives in {value}.",
        ("Where does the {name} live?", "In which town does the {name} live?"),
        ("Lima", "Oslo", "Rome", "Cairo", "Paris", "Tokyo", "Delhi", "Quito"),
    ),
    "nickname": Fact(
        "The {name} is called {value}.",
        ("What is the {name} called?", "Which name does the {name} have?"),
        ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana"),
    ),
}
