"""Packages of users, as an installer leaves them in a directory: a module, and the metadata that has its entry points."""

from __future__ import annotations

from pathlib import Path


def install(place: Path, name: str, code: str, group: str, **entries: str) -> Path:
    """Puts the module NAME into the directory, with the entry points `entries` of a group; returns the directory."""
    place.mkdir(parents=True, exist_ok=True)
    (place / f"{name}.py").write_text(code)
    metadata = place / f"{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n")
    lines = [f"[{group}]", *(f"{entry} = {target}" for entry, target in entries.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return place
