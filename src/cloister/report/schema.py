"""Write the JSON Schema of every output: `python -m cloister.report.schema [FOLDER]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cloister.report.outputs import OUTPUTS, json_schema

DEFAULT_FOLDER = Path("docs/schema")


def schema_files() -> dict[str, str]:
    """File name to text, one for each output."""
    return {f"{name}.schema.json": json.dumps(json_schema(name), indent=2) + "\n" for name in OUTPUTS}


def write_schemas(folder: Path) -> None:
    """Write all schema files into a folder and remove those of outputs that no longer exist."""
    folder.mkdir(parents=True, exist_ok=True)
    files = schema_files()
    for stale in set(folder.glob("*.schema.json")) - {folder / name for name in files}:
        stale.unlink()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_schemas(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_FOLDER)
