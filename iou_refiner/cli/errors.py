"""What the operating system refuses, with the cure."""

from __future__ import annotations

import errno

_CURES = {
    errno.ENOSPC: "The disk is full: make room, or name an output on another disk.",
    errno.EDQUOT: "The disk quota is used up: make room, or name an output on another disk.",
    errno.EFBIG: "The file would be larger than is allowed here: name an output on another disk.",
    errno.EROFS: "Nothing can be written there: name an output in another folder.",
    errno.EACCES: "Change its permissions, or name another file or folder.",
    errno.EPERM: "Change its permissions, or name another file or folder.",
    errno.ENOTDIR: "A part of the path is a file and no folder: name another path.",
    errno.EEXIST: "A file stands where a folder is needed: name another path.",
    errno.EISDIR: "A folder stands where a file is needed: name another path.",
    errno.ENAMETOOLONG: "Name a shorter path.",
    errno.ELOOP: "Its links lead in a circle: name another path.",
    errno.EMFILE: "Too many files are open: raise the limit (ulimit -n).",
    errno.EIO: "The disk is failing, or its connection is: name another one.",
}


def of_the_system(error: OSError) -> str:
    """An OSError in words: the file, what happened, and what to do about it."""
    cure = _CURES.get(error.errno or 0, "Check the path and its permissions, and the network if something is loaded.")
    if error.errno is None:
        return str(error) if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}. {cure}"
    name = "" if error.filename is None else f"{error.filename}: "
    return f"{name}{error.strerror}. {cure}"
