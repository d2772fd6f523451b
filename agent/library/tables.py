"""The tables of a LanceDB that are a library's: found, opened, and checked for who wrote them."""

from __future__ import annotations

from lancedb.db import DBConnection
from lancedb.table import Table

from agent.library.errors import speaking_of
from agent.library.place import Place
from agent.library.schema import model_of


def open_table(place: Place, connection: DBConnection, name: str) -> Table | None:
    """The newest state of a table; None where nothing was ever written to it. LibraryError where it cannot be used."""
    with speaking_of(place.name):
        try:
            table = connection.open_table(name)
        except ValueError as error:
            if "was not found" not in str(error):
                raise
            if place.has_files_of(name):
                raise ValueError(f"{name} has lost its versions") from None
            return None  # At most an empty folder, of a process that was killed as it made the table.
        model_of(table.schema, name, place.name)
        return table


def models(place: Place, connection: DBConnection) -> list[str]:
    """The models whose vectors are held, sorted; LibraryError where any table cannot be used."""
    names: list[str] = []
    token: str | None = None
    with speaking_of(place.name):
        while True:
            page = connection.list_tables(page_token=token)
            names += page.tables
            token = page.page_token
            if not token:
                break
        tables = [(name, open_table(place, connection, name)) for name in names]
        return sorted(model_of(table.schema, name, place.name) for name, table in tables if table is not None)
