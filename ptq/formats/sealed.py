"""JSON files that carry a checksum of their content, so that damage is found when they are read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ptq.errors import FormatError
from ptq.formats.digest import digest
from ptq.formats.staging import atomic_write_text


def seal(path: Path, content: Mapping[str, Any]) -> str:
    """Write ``content``, whole or not at all; returns its checksum. Raises PtqError when the disk is full."""
    text = json.dumps(content)
    checksum = digest(text.encode())
    atomic_write_text(path, f'{{"checksum": "{checksum}", "content": {text}}}\n')
    return checksum


def unseal(path: Path) -> tuple[dict[str, Any], str]:
    """Content and checksum of a file that `seal` wrote. Raises FormatError when it is damaged."""
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError):  # not JSON any more
        document = None
    if isinstance(document, dict):
        content, checksum = document.get("content"), document.get("checksum")
        if isinstance(content, dict) and digest(json.dumps(content).encode()) == checksum:
            return content, str(checksum)
    raise FormatError(f"{path} is damaged: its content does not have the checksum it was written with")
