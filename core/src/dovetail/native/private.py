"""Create and check folders from which code is loaded: a user who can write to one can run code as
the user who loads it, so only its owner may."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from dovetail.errors import PluginError

FOLDER_MODE = 0o700
SHARED = "is writable by"
UNMAPPED = 65534
"""Owner that a user namespace (rootless containers, systemd's PrivateUsers=) shows for files of
users that it does not map."""


def private_folder(name: str, folder: Path) -> Path:
    """Create `folder` for this user only, if it does not exist, and return it.

    `name` is that of the provider, for errors. Raises `PluginError`, with what to do, if another
    user owns the folder, can write to it, or can replace one of its parent folders; `OSError` if it
    cannot be created.
    """
    for missing in reversed([p for p in (folder, *folder.parents) if not p.exists()]):
        missing.mkdir(mode=FOLDER_MODE, exist_ok=True)  # another process may create it too
    where, why = folder, why_not_ours(folder)
    ways = (folder.absolute(), folder.resolve())
    for place in dict.fromkeys(place for way in ways for place in (way, *way.parents)):
        if why is None:
            where, why = place, _why_replaceable(place, is_above=place not in ways)
    if why is None:
        return folder
    inside = "" if where in (folder, *ways) else f", which lies in {where},"
    todo = "set XDG_CACHE_HOME to a folder that you own"
    if why.startswith(SHARED):
        todo += f", or check the contents of {where} and run `chmod go-w {where}`"
    raise PluginError(
        f"{name} does not load code from {folder}{inside} because it {why}; {todo}", provider=name
    )


def why_not_ours(path: Path) -> str | None:
    """Return why another user may have written the file or folder at `path`, or may change it: a
    verb phrase, or None. Root is trusted like the current user; a link is never trusted, and for a
    folder its links are followed."""
    status = path.stat() if path.is_dir() else path.lstat()
    if not stat.S_ISDIR(status.st_mode) and not stat.S_ISREG(status.st_mode):
        return "is neither a regular file nor a folder"
    return _why_anothers(status) or _why_shared(status)


def _why_replaceable(place: Path, *, is_above: bool) -> str | None:
    """Return why another user may replace what is in a folder (`is_above`), or the target of a
    link. The owner and anyone who can write to the folder may; in a sticky folder (/tmp) only the
    owner."""
    if place.is_symlink() and (why := _why_anothers(place.lstat())):
        return f"is a link that {why}"
    if not is_above:
        return None
    status = place.stat()
    # A file of a user that this namespace does not map belongs to the host, as does one of root.
    why = None if status.st_uid == UNMAPPED else _why_anothers(status)
    return why if why or status.st_mode & stat.S_ISVTX else _why_shared(status)


def _why_anothers(status: os.stat_result) -> str | None:
    if status.st_uid in (0, os.geteuid()):
        return None
    return f"belongs to user {status.st_uid}, but this process runs as user {os.geteuid()}"


def _why_shared(status: os.stat_result) -> str | None:
    if status.st_mode & stat.S_IWOTH:
        return f"{SHARED} all users (mode {stat.S_IMODE(status.st_mode):04o})"
    # A user's private group has the user's id (usual with umask 002), and group 0 is root's.
    if status.st_mode & stat.S_IWGRP and status.st_gid not in (0, os.geteuid()):
        return f"{SHARED} group {status.st_gid} (mode {stat.S_IMODE(status.st_mode):04o})"
    return None
