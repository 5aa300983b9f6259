"""Folders that code is loaded from: whoever can write to one runs code as whoever loads it, so only
its owner may."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from dovetail.errors import PluginError

FOLDER_MODE = 0o700
SHARED = "can be written by"
UNMAPPED = 65534
"""Owner that a user namespace (rootless containers, systemd's PrivateUsers=) shows of what belongs
to no user it knows."""


def private_folder(name: str, folder: Path) -> Path:
    """Make `folder` for this user alone, if it is not there, and return it.

    `name` is the provider's, for the error. Raises `PluginError`, with what to do, if somebody else
    owns the folder or can write to it, or can replace one of the folders it lies in; `OSError` if
    it cannot be made.
    """
    for missing in reversed([p for p in (folder, *folder.parents) if not p.exists()]):
        missing.mkdir(mode=FOLDER_MODE, exist_ok=True)  # another process may be making it too
    where, why = folder, why_not_ours(folder)
    ways = (folder.absolute(), folder.resolve())
    for place in dict.fromkeys(place for way in ways for place in (way, *way.parents)):
        if why is None:
            where, why = place, _why_replaceable(place, is_above=place not in ways)
    if why is None:
        return folder
    inside = "" if where in (folder, *ways) else f", which lies in {where},"
    todo = "set XDG_CACHE_HOME to a folder of your own"
    if why.startswith(SHARED):
        todo += f", or look through {where} and `chmod go-w {where}`"
    raise PluginError(
        f"{name} does not load code from {folder}{inside} because it {why}; {todo}", provider=name
    )


def why_not_ours(path: Path) -> str | None:
    """Why somebody else may have put there what is at `path`, or may change it: a verb phrase, or
    None if nobody can. Root counts as oneself; a link is never trusted, a folder is what its links
    lead to."""
    status = path.stat() if path.is_dir() else path.lstat()
    if not stat.S_ISDIR(status.st_mode) and not stat.S_ISREG(status.st_mode):
        return "is a link or no file at all"
    return _why_anothers(status) or _why_shared(status)


def _why_replaceable(place: Path, *, is_above: bool) -> str | None:
    """Why somebody else may put theirs in the place of what lies in a folder (`is_above`), or where
    a link leads to: its owner may, and who can write to the folder, but in a sticky one (/tmp) only
    the owner."""
    if place.is_symlink() and (why := _why_anothers(place.lstat())):
        return f"is a link that {why}"
    if not is_above:
        return None
    status = place.stat()
    # What belongs to nobody that this user namespace knows is the host's, as is root's.
    why = None if status.st_uid == UNMAPPED else _why_anothers(status)
    return why if why or status.st_mode & stat.S_ISVTX else _why_shared(status)


def _why_anothers(status: os.stat_result) -> str | None:
    if status.st_uid in (0, os.geteuid()):
        return None
    return f"belongs to user {status.st_uid}, and this process runs as user {os.geteuid()}"


def _why_shared(status: os.stat_result) -> str | None:
    if status.st_mode & stat.S_IWOTH:
        return f"{SHARED} everybody (mode {stat.S_IMODE(status.st_mode):04o})"
    # A user's own group has the user's number (umask 002 is usual there), and group 0 is root's.
    if status.st_mode & stat.S_IWGRP and status.st_gid not in (0, os.geteuid()):
        return f"{SHARED} group {status.st_gid} (mode {stat.S_IMODE(status.st_mode):04o})"
    return None
