"""The fingerprint of plain values: equal values have equal fingerprints, on every machine."""

import json
from hashlib import blake2b
from typing import Any


def fingerprint(value: Any, *, sort_keys: bool = False) -> str:
    """128 bits of BLAKE2b over a value's JSON, in hexadecimal. `sort_keys` where the order of a mapping's
    keys carries no meaning.
    """
    content = json.dumps(value, sort_keys=sort_keys).encode()
    return blake2b(content, digest_size=16).hexdigest()
