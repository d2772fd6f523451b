"""The library: one LanceDB for many videos, with a collection for each model that made vectors in it."""

from __future__ import annotations

from pathlib import Path

import lancedb

from agent.library.collection import Collection, Embed
from agent.library.errors import speaking_of
from agent.library.place import Place
from agent.library.records import Video
from agent.library.tables import models
from agent.library.verification import problems_of


class Library:
    """A library in a folder, or at an address that LanceDB opens (s3://, gs://, az://, memory://).

    create: make the folder where there is none. LibraryError where there is no library, a damaged one, one that a newer
    version wrote, or something else. Any number of processes may have it open, and write to it, at once.
    """

    def __init__(self, location: str | Path, create: bool = False) -> None:
        self._place = Place(location)
        if create:
            self._place.make()
        self._place.check_exists()
        with speaking_of(self._place.name):
            self._connection = lancedb.connect(self._place.uri)
        self.collections()

    def collection(self, model: str, embed: Embed | None = None) -> Collection:
        """The records with the vectors of one model; it is made when something is written to it."""
        return Collection(self._place, self._connection, model, embed)

    def collections(self) -> list[Collection]:
        """All collections that hold something, by model, without their models: they can be searched by text."""
        return [self.collection(model) for model in models(self._place, self._connection)]

    def videos(self) -> list[Video]:
        """What is held of each video, a line for each model."""
        return [video for collection in self.collections() for video in collection.videos()]

    def remove(self, video: str) -> int:
        """Remove all of a video (its content hash); how many passages, scenes and notes these were."""
        return sum(collection.remove(video) for collection in self.collections())

    def verify(self) -> list[str]:
        """A sentence for each thing that is wrong; reads everything."""
        tables = [collection.open() for collection in self.collections()]
        return [problem for table in tables if table is not None for problem in problems_of(table, self._place.name)]


def rebuild(location: str | Path) -> Path:
    """Begin a new, empty library in a folder; the old one is kept, whatever its state, under the name returned."""
    return Place(location).set_aside()
