"""Nested settings as dotted keys."""

from typing import Any


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """{"a.b.0": value} for every leaf of nested mappings and lists; empty ones are leaves.

    Example: {"optimizer": {"lr": 1.0}, "stages": []} gives {"optimizer.lr": 1.0, "stages": []}.
    """
    if isinstance(values, dict) and values:
        items = [(str(key), value) for key, value in values.items()]
    elif isinstance(values, list) and values:
        items = [(str(i), value) for i, value in enumerate(values)]
    else:
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat
