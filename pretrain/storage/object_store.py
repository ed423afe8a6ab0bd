"""Paths in an object store (s3://, gs://, abfs://), as StoragePath describes them.

Credentials and endpoints are the store's own environment variables or the machine's role, read by obstore.
One put is atomic, the parts of a large one become an object when the last call joins them, and `create` is a
conditional put (If-None-Match: *), so of all hosts one succeeds. Objects have no folders, no rename and no
append.

A request that fails for the moment (5xx, a lost connection, a timeout) is tried again with growing, random
waits, first silently by obstore, part by part, then as a whole, reported to `options.on_retry`. One that is
refused (4xx) raises UserError at once.

Cost: a save of one rank is 15 requests and one for each 16 MiB, a claim 2; a file is verified in ranges of
16 MiB, several at once.
"""

from __future__ import annotations

import hashlib
import io
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from pathlib import PurePosixPath
from typing import Any, BinaryIO, TypeVar

from trifold.modeling.errors import UserError
from trifold.pretrain.storage.storage_path import FileDigest, StorageOptions

try:
    import obstore
    from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
    from obstore.store import from_url
except ImportError as error:
    raise UserError(
        "a URL requires Trifold's extra `objects`: pip install -c constraints.txt -e '.[objects]'"
    ) from error

SCHEMES = ("s3", "gs", "abfs", "abfss", "az")
TRIES = 6
FIRST_WAIT, LONGEST_WAIT = 1.0, 20.0  # seconds: 1, 2, 4, 8, 16, each shortened by up to half at random
SMALLEST_PART = 5 << 20  # bytes, as S3 requires
RETRY: Any = {
    "max_retries": 3,
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=2)},
}
CLIENT: Any = {
    "timeout": timedelta(minutes=2),
    "allow_http": True,  # http:// is used only where a person's endpoint has it
}
T = TypeVar("T")


class StorageUnreachable(UserError):
    """A store could not be reached, or was too busy, for half a minute."""


class StorageDenied(UserError):
    """A store refuses a request, and will again: no permission, no such bucket."""

    permanent = True


@dataclass(frozen=True, order=True)
class ObjectPath:
    """An object, or a common prefix of objects as a folder: scheme://bucket/key."""

    url: str
    options: StorageOptions = field(default=StorageOptions(), compare=False, repr=False)

    poll_seconds = 15.0  # each look is a request

    @classmethod
    def from_url(cls, url: str) -> ObjectPath:
        """Raises UserError where no store has such URLs."""
        scheme, _, rest = url.partition("://")
        try:
            if scheme not in SCHEMES or "//" in rest.rstrip("/"):
                raise ValueError("another scheme, or an empty name in it")
            _store(_root(url))
        except (BaseError, ValueError) as error:
            raise UserError(
                f"{url} is no place of an object store ({_message(error)}): give s3://, gs:// or abfs://,"
                " or a path"
            ) from None
        return cls(url.rstrip("/"))

    def __str__(self) -> str:
        return self.url

    def __reduce__(self) -> tuple[type[ObjectPath], tuple[str]]:
        return ObjectPath, (self.url,)

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(f"{self.url}/{name}", self.options)

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[1]

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> ObjectPath:
        return ObjectPath(self.url.rsplit("/", 1)[0], self.options)

    def with_options(self, options: StorageOptions) -> ObjectPath:
        return ObjectPath(self.url, options)

    def exists(self) -> bool:
        """Whether there is such an object; a folder is none."""
        try:
            self.size()
        except FileNotFoundError:
            return False
        return True

    def size(self) -> int:
        return self.version()[0]

    def version(self) -> tuple[int, str]:
        """Its size and its store's tag."""
        facts = self._request(lambda store: obstore.head(store, self._key))
        return int(facts["size"]), str(facts["e_tag"])

    def measure(self) -> FileDigest:
        digest, total, chunk_bytes = hashlib.sha256(), self.size(), self.options.chunk_bytes
        for start in range(0, total, chunk_bytes):
            digest.update(self.read_at(start, min(start + chunk_bytes, total)))
        return FileDigest(total, digest.hexdigest())

    def read_bytes(self) -> bytes:
        return self._request(lambda store: bytes(obstore.get(store, self._key).bytes()))

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def read_at(self, start: int, stop: int) -> bytes:
        return self._request(lambda store: bytes(obstore.get_range(store, self._key, start=start, end=stop)))

    def open(self) -> BinaryIO:
        return io.BufferedReader(_RangeReader(self), self.options.chunk_bytes)

    def entries(self) -> list[ObjectPath]:
        listing = self._request(lambda store: obstore.list_with_delimiter(store, self._key))
        keys = [*listing["common_prefixes"], *(entry["path"] for entry in listing["objects"])]
        return sorted(self._with_key(key) for key in keys)

    def files_below(self) -> list[ObjectPath]:
        pages = self._request(lambda store: list(obstore.list(store, self._key)))
        return sorted(self._with_key(entry["path"]) for page in pages for entry in page)

    def make_folder(self) -> None:
        """Nothing: an object's name makes its folders."""

    def write(self, buffers: Sequence[memoryview]) -> FileDigest:
        """Put an object in parts. S3 checks each part against the sha256 that its request is signed with."""
        digest, total = hashlib.sha256(), sum(len(buffer) for buffer in buffers)
        chunk_bytes = self.options.chunk_bytes

        def parts() -> Iterator[bytes]:
            nonlocal digest
            digest = hashlib.sha256()  # a second try starts again
            for buffer in buffers:
                for start in range(0, len(buffer), chunk_bytes):
                    self.options.before_write("write", self)
                    part = bytes(buffer[start : start + chunk_bytes])
                    digest.update(part)
                    yield part

        if total <= chunk_bytes:
            self._put(lambda: b"".join(parts()), use_multipart=False)
        else:
            self._put(parts, chunk_size=max(chunk_bytes, SMALLEST_PART), max_concurrency=4)
        return FileDigest(total, digest.hexdigest())

    def replace(self, content: bytes) -> None:
        self._put(lambda: content, use_multipart=False)

    def create(self, content: bytes) -> bool:
        """False for all but one, also for one whose put was done but whose answer was lost: it then takes the
        next number.
        """
        self.options.before_write("create", self)
        try:
            self._request(lambda store: obstore.put(store, self._key, content, mode="create"), writes=True)
        except FileExistsError:
            return False
        return True

    def remove(self) -> None:
        self.options.before_write("remove", self)
        with suppress(FileNotFoundError):
            self._request(lambda store: obstore.delete(store, self._key))

    def remove_folder(self, first: str) -> None:
        for entry in sorted(self.entries(), key=lambda entry: entry.name != first):
            entry.remove()

    @property
    def _key(self) -> str:
        return self.url[len(_root(self.url)) + 1 :]

    def _with_key(self, key: str) -> ObjectPath:
        return ObjectPath(f"{_root(self.url)}/{key}", self.options)

    def _put(self, content: Callable[[], bytes | Iterator[bytes]], **how: Any) -> None:
        self.options.before_write("put", self)
        self._request(lambda store: obstore.put(store, self._key, content(), **how), writes=True)

    def _request(self, request: Callable[[Any], T], writes: bool = False) -> T:
        """The store's answer, after up to TRIES tries. Raises FileNotFoundError (reading), FileExistsError
        (creating), StorageDenied, StorageUnreachable.
        """
        for tries in range(1, TRIES + 1):
            try:
                return request(_store(_root(self.url)))
            except (AlreadyExistsError, PreconditionError):
                raise FileExistsError(self.url) from None
            except (BaseError, FileNotFoundError) as error:
                message = _message(error)
                self._raise_if_final(error, message, tries, writes)
            wait = min(FIRST_WAIT * 2 ** (tries - 1), LONGEST_WAIT) * random.uniform(0.5, 1)
            facts = {"place": self.url, "tries": tries, "seconds": round(wait, 2), "reason": message}
            self.options.on_retry("request_failed", **facts)
            time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def _raise_if_final(self, error: Exception, message: str, tries: int, writes: bool) -> None:
        """Raise where another try is of no use."""
        if isinstance(error, FileNotFoundError) and not writes and "NoSuchBucket" not in message:
            raise FileNotFoundError(self.url) from None
        status = re.search(r"status code: (4\d\d)", str(error))
        if status and status[1] not in ("408", "409", "429"):
            raise StorageDenied(f"{self.url} was refused: {message}") from None
        if tries == TRIES:
            raise StorageUnreachable(
                f"{self.url} could not be reached, tried {tries} times: {message}"
            ) from None


@cache
def _store(root: str) -> Any:
    return from_url(root, retry_config=RETRY, client_options=CLIENT)


def _root(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.split('/', 1)[0]}"


def _message(error: BaseException) -> str:
    """The store's own words, out of an answer of many lines."""
    text = str(error)
    code, message = (re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL) for tag in ("Code", "Message"))
    if code and message:
        return f"{code[1]}, {message[1]}"
    return text.split("\n", 1)[0].rsplit(" - ", 1)[-1].split(": <?xml", 1)[0].strip()


class _RangeReader(io.RawIOBase):
    """An object as a raw file."""

    def __init__(self, path: ObjectPath) -> None:
        self._path, self._position, self._size = path, 0, path.size()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        stop = min(self._position + len(buffer), self._size)
        content = self._path.read_at(self._position, stop) if stop > self._position else b""
        buffer[: len(content)] = content
        self._position = max(stop, self._position)
        return len(content)
