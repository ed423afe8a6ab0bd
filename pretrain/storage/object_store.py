"""Places in an object store (s3://, gs://, abfs://), which answer what storage.py answers for paths.

In: URLs; credentials and endpoints are the store's own environment variables or the machine's role, read by
obstore. Out: objects that are there whole or not at all: one put is atomic, a large one goes up in parts that
count when the last call joins them, and `create` is a conditional put (If-None-Match: *), so a claim has one
winner on every host. Objects have no folders, no rename and no append. Each request that fails for the moment
(5xx, a lost connection, a timeout) is tried again with growing, random waits, first silently by obstore, part
by part, then as a whole, told as an event; one that is refused (4xx) ends in one sentence at once. Cost: a
save of one rank is 15 requests and one for each 16 MiB, a claim 2; a file is verified in ranges of 16 MiB,
several at once.
"""

from __future__ import annotations

import hashlib
import io
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import PurePosixPath
from typing import Any, TypeVar

from trifold.modeling.errors import UserError
from trifold.pretrain.storage import storage
from trifold.pretrain.storage.storage import FileDigest, Location

try:
    import obstore
    from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
    from obstore.store import from_url
except ImportError as error:
    raise UserError(
        "a URL needs Trifold's extra `objects`: pip install -c constraints.txt -e '.[objects]'"
    ) from error

SCHEMES = ("s3", "gs", "abfs", "abfss", "az")
TRIES, FIRST_WAIT, LONGEST_WAIT = (
    6,
    1.0,
    20.0,
)  # seconds: 1, 2, 4, 8, 16, each shortened by up to half at random
RETRY: Any = {
    "max_retries": 3,
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=2)},
}
CLIENT: Any = {
    "timeout": timedelta(minutes=2),
    "allow_http": True,
}  # http:// only where a person's endpoint says so
T = TypeVar("T")


class StorageUnreachable(UserError):
    """A store could not be reached, or was too busy, for half a minute."""


class StorageDenied(UserError):
    """A store refuses what it was asked, and will again: no permission, no such bucket."""

    lasting = True


@dataclass(frozen=True, order=True)
class ObjectPath:
    """An object, or what others begin with as with a folder: scheme://bucket/key. Named and read as a
    pathlib.Path is.
    """

    url: str

    @classmethod
    def open(cls, url: str) -> ObjectPath:
        """The place of a URL that a person gave. Raises UserError where no store has such URLs."""
        scheme, _, rest = url.partition("://")
        try:
            if scheme not in SCHEMES or "//" in rest.rstrip("/"):
                raise ValueError("another scheme, or an empty name in it")
            _store(_root(url))
        except (BaseError, ValueError) as error:
            raise UserError(
                f"{url} is no place of an object store ({_said(error)}): give s3://, gs:// or abfs://, or a"
                " path"
            ) from None
        return cls(url.rstrip("/"))

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[1]

    @property
    def parent(self) -> ObjectPath:
        return ObjectPath(self.url.rsplit("/", 1)[0])

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def key(self) -> str:
        return self.url[len(_root(self.url)) + 1 :]

    def exists(self) -> bool:
        """Whether there is such an object (a folder is none)."""
        try:
            self.size()
        except FileNotFoundError:
            return False
        return True

    def read_bytes(self) -> bytes:
        return self._request(lambda store: bytes(obstore.get(store, self.key).bytes()))

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def write_text(self, text: str) -> None:
        self._request(
            lambda store: obstore.put(store, self.key, text.encode(), use_multipart=False), writes=True
        )

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove it. Most stores do not say whether it was there."""
        with suppress(FileNotFoundError):
            self._request(lambda store: obstore.delete(store, self.key))

    def below(self) -> list[ObjectPath]:
        """All objects whose names begin with this one's and a slash, at any depth, sorted."""
        pages = self._request(lambda store: list(obstore.list(store, self.key)))
        return sorted(ObjectPath(f"{_root(self.url)}/{each['path']}") for page in pages for each in page)

    def version(self) -> tuple[int, str]:
        """Its size and its store's tag, which changes with the content."""
        facts = self._request(lambda store: obstore.head(store, self.key))
        return facts["size"], str(facts["e_tag"])

    def stream(self) -> io.BufferedReader:
        """The object as a file to read from its start, in ranges of CHUNK."""
        return io.BufferedReader(_Stream(self), storage.CHUNK)

    def make_folder(self) -> None:
        """Nothing: an object's name makes its folders."""

    def write(self, pieces: Sequence[memoryview]) -> FileDigest:
        """Put an object in parts of CHUNK, hashed on the way. S3 checks each part against the sha256 that its
        request is signed with.
        """
        digest, total = hashlib.sha256(), sum(len(piece) for piece in pieces)

        def parts() -> Iterator[bytes]:
            nonlocal digest
            digest = hashlib.sha256()  # a second try begins anew
            for piece in pieces:
                for start in range(0, len(piece), storage.CHUNK):
                    storage.before_write_hook("write", self)
                    part = bytes(piece[start : start + storage.CHUNK])
                    digest.update(part)
                    yield part

        storage.before_write_hook("put", self)
        if total <= storage.CHUNK:
            self._request(
                lambda store: obstore.put(store, self.key, b"".join(parts()), use_multipart=False),
                writes=True,
            )
        else:
            self._request(
                lambda store: obstore.put(
                    store, self.key, parts(), chunk_size=max(storage.CHUNK, 5 << 20), max_concurrency=4
                ),
                writes=True,
            )
        return FileDigest(total, digest.hexdigest())

    def replace(self, content: bytes) -> FileDigest:
        """One put is one stroke."""
        storage.before_write_hook("put", self)
        self._request(lambda store: obstore.put(store, self.key, content, use_multipart=False), writes=True)
        return FileDigest(len(content), hashlib.sha256(content).hexdigest())

    def create(self, content: bytes) -> bool:
        """False for all but one, also for one whose put was done but whose answer was lost: it then takes the
        next number.
        """
        storage.before_write_hook("create", self)
        try:
            self._request(lambda store: obstore.put(store, self.key, content, mode="create"), writes=True)
        except FileExistsError:
            return False
        return True

    def remove_folder(self, first: str) -> None:
        """Remove all objects below, the one named `first` before the others."""
        for path in sorted(self.entries(), key=lambda path: path.name != first):
            storage.before_write_hook("remove", path)
            path.unlink()

    def entries(self) -> list[Location]:
        found = self._request(lambda store: obstore.list_with_delimiter(store, self.key))
        paths = [*found["common_prefixes"], *(each["path"] for each in found["objects"])]
        return sorted(ObjectPath(f"{_root(self.url)}/{path}") for path in paths)

    def size(self) -> int:
        return int(self._request(lambda store: obstore.head(store, self.key))["size"])

    def read_at(self, start: int, stop: int) -> bytes:
        return self._request(lambda store: bytes(obstore.get_range(store, self.key, start=start, end=stop)))

    def measure(self) -> FileDigest:
        """Read a whole object back and hash it."""
        digest, total = hashlib.sha256(), self.size()
        for start in range(0, total, storage.CHUNK):
            digest.update(self.read_at(start, min(start + storage.CHUNK, total)))
        return FileDigest(total, digest.hexdigest())

    def _request(self, request: Callable[[Any], T], writes: bool = False) -> T:
        """What the store answers, after up to TRIES tries. Raises FileNotFoundError (reading),
        FileExistsError (creating).
        """
        for tries in range(1, TRIES + 1):
            try:
                return request(_store(_root(self.url)))
            except (AlreadyExistsError, PreconditionError):
                raise FileExistsError(self.url) from None
            except (BaseError, FileNotFoundError) as error:
                said, status = _said(error), re.search(r"status code: (4\d\d)", str(error))
                if isinstance(error, FileNotFoundError) and not writes and "NoSuchBucket" not in said:
                    raise FileNotFoundError(self.url) from None
                if status and status[1] not in ("408", "409", "429"):
                    raise StorageDenied(f"{self.url} was refused: {said}") from None
                if tries == TRIES:
                    raise StorageUnreachable(
                        f"{self.url} could not be reached, tried {tries} times: {said}"
                    ) from None
            wait = min(FIRST_WAIT * 2 ** (tries - 1), LONGEST_WAIT) * random.uniform(0.5, 1)
            storage.on_retry(
                "request_failed", place=self.url, tries=tries, seconds=round(wait, 2), reason=said
            )
            time.sleep(wait)
        raise AssertionError("the last try returns or raises")


@cache
def _store(root: str) -> Any:
    return from_url(root, retry_config=RETRY, client_options=CLIENT)


def _root(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.split('/', 1)[0]}"


def _said(error: BaseException) -> str:
    """The store's own words, out of an answer of many lines."""
    text = str(error)
    code, message = (re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL) for tag in ("Code", "Message"))
    first = text.split("\n", 1)[0].rsplit(" - ", 1)[-1].split(": <?xml", 1)[0]
    return f"{code[1]}, {message[1]}" if code and message else first.strip()


class _Stream(io.RawIOBase):
    def __init__(self, place: ObjectPath) -> None:
        self._place, self._at, self._size = place, 0, place.size()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = (
            self._place.read_at(self._at, stop)
            if (stop := min(self._at + len(buffer), self._size)) > self._at
            else b""
        )
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)
