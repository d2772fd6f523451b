"""The library: one LanceDB that holds passages, scenes and notes of many videos, keyed by content hash.

library = Library("~/.cache/ivmlx/library", create=True)
held = library.collection("iv3-tiny", embed)
video = content_hash("film.mp4")
held.replace(video, "film.mp4", {"rate": 1.0}, [Entry("passage", (12.0, 15.5), "She left at noon.", "asr")])
held.search("when did she leave?")
"""

import importlib.util

from agent.library.errors import LibraryError, LibraryFailureError

if importlib.util.find_spec("lancedb") is None:
    raise LibraryError("The library needs LanceDB: run pip install 'ivmlx[agent]'.")

from agent.library.collection import Collection, Embed
from agent.library.records import KINDS, Entry, Kind, Record, Video
from agent.library.search import MODES, Mode
from agent.library.store import Library, rebuild

__all__ = [
    "KINDS",
    "MODES",
    "Collection",
    "Embed",
    "Entry",
    "Kind",
    "Library",
    "LibraryError",
    "LibraryFailureError",
    "Mode",
    "Record",
    "Video",
    "rebuild",
]
