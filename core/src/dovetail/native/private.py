"""Folders that code is loaded from: whoever can write to one runs code as whoever loads it, so only its owner may."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from dovetail.errors import PluginError

FOLDER_MODE = 0o700


def private_folder(name: str, folder: Path) -> Path:
    """Make `folder` for this user alone, if it is not there, and return it.

    `name` is the provider's, for the error. Raises `PluginError`, with what to do, if somebody else owns the folder or can
    write to it, or can replace one of the folders it lies in; `OSError` if it cannot be made.
    """
    for missing in reversed([p for p in (folder, *folder.parents) if not p.exists()]):
        missing.mkdir(mode=FOLDER_MODE, exist_ok=True)  # another process may be making it too
    where, why = folder, why_not_ours(folder)
    for above in dict.fromkeys((*folder.absolute().parents, *folder.resolve().parents)):
        if why is None and above.stat().st_mode & stat.S_ISVTX == 0:  # sticky (/tmp): nobody renames another's folder
            where, why = above, _why_shared(above.stat())
    if why is None:
        return folder
    inside = "" if where == folder else f", which lies in {where},"
    todo = f"set XDG_CACHE_HOME to a folder of your own, or look through {where} and `chmod go-w {where}`"
    raise PluginError(f"{name} does not load code from {folder}{inside} because it {why}; {todo}", provider=name)


def why_not_ours(path: Path) -> str | None:
    """Why somebody else may have put there what is at `path`, or may change it: a verb phrase, or None if nobody can. Root
    counts as oneself; a link is never trusted, a folder is what its links lead to."""
    status = path.stat() if path.is_dir() else path.lstat()
    if not stat.S_ISDIR(status.st_mode) and not stat.S_ISREG(status.st_mode):
        return "is a link or no file at all"
    if status.st_uid not in (0, os.geteuid()):
        return f"belongs to user {status.st_uid}, and this process runs as user {os.geteuid()}"
    return _why_shared(status)


def _why_shared(status: os.stat_result) -> str | None:
    if status.st_mode & stat.S_IWOTH:
        return f"can be written by everybody (mode {stat.S_IMODE(status.st_mode):04o})"
    # A user's own group has the user's number (umask 002 is usual there), and group 0 is root's.
    if status.st_mode & stat.S_IWGRP and status.st_gid not in (0, os.geteuid()):
        return f"can be written by group {status.st_gid} (mode {stat.S_IMODE(status.st_mode):04o})"
    return None
