"""Task heads of published architectures: a stock class with labels or spans on the body of another one."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from trifold.modeling.config import ModelConfig
from trifold.modeling.huggingface.fields import label_fields, labels
from trifold.modeling.huggingface.tables import Architecture


def with_task_head(
    base: Architecture,
    stock_class: str,
    head: Literal["labels", "spans"],
    *,
    body: str,
    module: str,
    settings: Mapping[str, Any] | None = None,
    fields: Mapping[str, Any] | None = None,
) -> Architecture:
    """The architecture `base` with a linear head that the stock class calls `module`.

    `body` is the name table without a head. `settings` are what its stock config has besides the base's, and
    `fields` what its ModelConfig has.
    """
    table = f"{body}\n{module}.weight = head.labels.weight\n{module}.bias = head.labels.bias\n"

    def write(config: ModelConfig, special: Mapping[str, int]) -> dict[str, Any]:
        hf = {**base.write(config, special), "architectures": [stock_class]}
        return {**hf, **label_fields(config), **(settings or {})}

    def read(hf: dict[str, Any]) -> dict[str, Any]:
        outputs = {"labels": labels(hf)} if head == "labels" else {"spans": True}
        return {**base.read(hf), **outputs, **(fields or {})}

    return replace(base, stock_class=stock_class, table=table, write=write, read=read, also=(), prefix="")
