"""Results of long runs as JSON lines: written as they come, read again when a run is resumed.

The first line holds the settings that all records share; a file with other settings is refused. What may grow from run
to run (more lengths, more caches) is part of the records' keys instead. A line that was cut off by an interruption is
dropped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class RecordFile:
    """Records with unique keys, in memory and, with a path, on disk.

    Args:
        path: JSON lines; made if missing; None keeps the records in memory only.
        settings: JSON-ready values that all records must share.
        key: names of the fields that tell records apart.

    Raises:
        ValueError: the file holds records of other settings, or is not such a file.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any], key: Sequence[str]) -> None:
        self.path = path
        self.key = tuple(key)
        self._records: dict[tuple[Any, ...], Record] = {}
        # as they will read after a way through JSON
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        if path is not None:
            self._open(path)

    def _open(self, path: Path) -> None:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
        if not lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"settings": self._settings}, ensure_ascii=False) + "\n", encoding="utf-8")
            return
        try:
            header, *records = map(json.loads, lines)
            found = header["settings"]
            self._records = {self._key_of(record): record for record in records}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected the records of an earlier run ({error!r})") from None
        names = [name for name in {**found, **self._settings} if found.get(name) != self._settings.get(name)]
        if names:
            different = ", ".join(f"{name}={found.get(name)!r}, now {self._settings.get(name)!r}" for name in names)
            raise ValueError(f"{path}: its records have {different}: expected the same settings, or a new file")
        path.write_text("".join(lines), encoding="utf-8")

    def _key_of(self, record: Record) -> tuple[Any, ...]:
        return tuple(record[name] for name in self.key)

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Any:
        return iter(self._records.values())

    def get(self, *key: Any) -> Record | None:
        """The record with this key, None if there is none yet."""
        return self._records.get(key)

    def add(self, record: Record) -> Record:
        """Keeps a record, replacing one with its key, and appends it to the file."""
        self._records[self._key_of(record)] = record
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        return record
