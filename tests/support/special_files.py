"""Files that are no files: what hangs, never ends or cannot be read."""

import os
import socket
import sys
from pathlib import Path

KINDS = (
    "pipe",
    "link to a pipe",
    "endless device",
    "socket",
    "folder",
    "link to nowhere",
    "circle",
)


def make_special(path: Path, kind: str) -> None:
    """A thing of this kind under this name."""
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "link to a pipe":
            os.mkfifo(path.with_name(f"{path.name}-pipe"))
            path.symlink_to(f"{path.name}-pipe")
        case "endless device":
            path.symlink_to("/dev/zero")
        case "socket":
            here = os.getcwd()
            os.chdir(path.parent)  # a socket's address has 108 bytes
            try:
                with socket.socket(socket.AF_UNIX) as one:
                    one.bind(path.name)
            finally:
                os.chdir(here)
        case "folder":
            path.mkdir()
        case "link to nowhere":
            path.symlink_to(path.with_name("nowhere"))
        case "circle":
            path.symlink_to(path)
        case _:
            raise ValueError(kind)


CAN_BE_MADE = sys.platform.startswith("linux")
