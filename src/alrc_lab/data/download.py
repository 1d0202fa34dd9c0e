"""Get one large file over HTTP and take named files out of it, so that an interruption or a bad byte costs little.

Knows nothing about any data set. Trusts nothing it receives: a file counts as downloaded only when its MD5 is the
expected one, and no path inside an archive decides where a byte is written.
"""

import hashlib
import http.client
import re
import shutil
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Collection
from pathlib import Path, PurePosixPath

from alrc_lab.data.image_set import DataError

_TIMEOUT_S = 30
_BLOCK_BYTES = 1 << 18


def download(
    url: str,
    target: Path,
    *,
    md5: str,
    on_progress: Callable[[int, int | None], None],
    on_message: Callable[[str], None],
) -> None:
    """Download a file, going on from an earlier part, and put it in place once its MD5 is right.

    What has arrived lies in `<target>.part`; calling again continues it by an HTTP Range request. A server that
    ignores the range, a part longer than the file, and a resumed file with the wrong MD5 each start again from
    nothing, once.

    Args:
        url: An http or https address.
        target: Where the finished file goes; its folder is created.
        md5: Expected checksum, 32 hexadecimal digits.
        on_progress: Called with bytes present so far and bytes in all (None if the server does not say).
        on_message: Called with one sentence when something other than bytes happens.

    Raises:
        DataError: The address cannot be reached, the connection broke, or the file is not the expected one.
    """
    part = target.with_name(target.name + ".part")
    is_resumed = _receive(url, part, on_progress, on_message)
    digest = file_md5(part)
    if digest != md5 and is_resumed:
        on_message(f"{part} was not the beginning of {url}; downloading from the start")
        part.unlink()
        _receive(url, part, on_progress, on_message)
        digest = file_md5(part)
    if digest != md5:
        raise reject(part, target, digest=digest, expected=md5, origin=url)
    part.replace(target)


def reject(file: Path, target: Path, *, digest: str, expected: str, origin: str) -> DataError:
    """Move a file with the wrong MD5 aside to `<target>.bad`; return the error to raise."""
    size = file.stat().st_size
    bad = target.with_name(target.name + ".bad")
    file.replace(bad)
    return DataError(
        f"{origin}: the file has MD5 {digest} ({size:,} bytes) where {expected} was expected; "
        f"it was moved to {bad}, nothing was unpacked"
    )


def file_md5(file: Path) -> str:
    """Return a file's MD5: a check against accidents, which is all that a published MD5 can be."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _receive(
    url: str,
    part: Path,
    on_progress: Callable[[int, int | None], None],
    on_message: Callable[[str], None],
) -> bool:
    """Fill `part` with the whole of `url`; return whether its beginning was already there."""
    done = start = part.stat().st_size if part.exists() else 0
    with _request(url, start) as reply:
        first, total = _extent(reply)
        if start and first is None and total == start:
            return True
        if first in (0, start):
            if start:
                on_message(f"going on from {start:,} bytes" if first else "starting again: no resuming here")
            done = first
            try:
                part.parent.mkdir(parents=True, exist_ok=True)
                with part.open("ab" if first else "wb") as sink:
                    on_progress(done, total)
                    while block := reply.read(_BLOCK_BYTES):
                        sink.write(block)
                        done += len(block)
                        on_progress(done, total)
            except (OSError, http.client.HTTPException) as error:
                raise _failure(url, error, f"{done:,} bytes are kept, repeat the command to go on") from error
    if first not in (0, start):
        if not start:
            raise DataError(f"{url} answered with a part of the file where the whole of it was asked for")
        on_message(f"starting again: {part.name} does not fit what the server has")
        part.unlink()
        return _receive(url, part, on_progress, on_message)
    if total is not None and done < total:
        ended = ConnectionError(f"the connection ended after {done:,} of {total:,} bytes")
        raise _failure(url, ended, "they are kept, repeat the command to go on")
    return first > 0


def _request(url: str, start: int) -> http.client.HTTPResponse | urllib.error.HTTPError:
    """Ask for `url` from byte `start` on; an unsatisfiable range is an answer, any other refusal an error."""
    if not url.startswith(("http://", "https://")):
        raise DataError(f"{url!r} is not an http or https address")
    headers = {"User-Agent": "alrc", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:
            return error
        error.close()
        raise DataError(f"{url} answered {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _failure(url, error, f"{start:,} bytes of an earlier try are kept" if start else "") from error


def _failure(url: str, error: Exception, kept: str) -> DataError:
    """Put a network or disk error, and what was kept, into one line."""
    why = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
    return DataError(f"{url} could not be downloaded: {why}" + (f" ({kept})" if kept else ""))


def _extent(reply: http.client.HTTPResponse | urllib.error.HTTPError) -> tuple[int | None, int | None]:
    """Return the first byte this answer carries (None: it carries none of the file) and the file's whole size."""
    if reply.status == 200:
        length = reply.headers.get("Content-Length", "")
        return 0, int(length) if length.isdigit() else None
    found = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", reply.headers.get("Content-Range", ""))
    if found is None:
        return None, None
    first, total = found.groups()
    return (int(first) if first else None), (None if total == "*" else int(total))


def unpack(archive: Path, folder: Path, *, top: str, names: Collection[str]) -> set[str]:
    """Copy the named files of a `.tar.gz` into a folder, and nothing else.

    Only regular files called `<top>/<name>` are copied, each to `<folder>/<name>`, so that an archive cannot choose
    where it writes. One that tries - an absolute path, a `..`, a link, a device - is refused as a whole.

    Args:
        archive: The file to read.
        folder: An existing folder; files already copied stay in it after an error.
        top: The archive's one folder.
        names: File names wanted.

    Returns:
        The names found.

    Raises:
        DataError: The archive is damaged or holds a member that has no place in a data set.
    """
    found: set[str] = set()
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts or not (member.isfile() or member.isdir()):
                    raise DataError(f"{archive} holds the unsafe member {member.name!r}; it was not unpacked")
                source = tar.extractfile(member) if path.parent == PurePosixPath(top) else None
                if source is not None and path.name in names:
                    with source, (folder / path.name).open("wb") as sink:
                        shutil.copyfileobj(source, sink)
                    found.add(path.name)
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise DataError(f"{archive} could not be unpacked: {error}") from error
    return found
