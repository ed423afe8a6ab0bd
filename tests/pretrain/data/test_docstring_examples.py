import doctest
from types import ModuleType

import pytest

from trifold.pretrain.data import collate, packing


@pytest.mark.parametrize("module", [packing, collate], ids=lambda module: module.__name__)
def test_the_worked_examples_in_docstrings_are_true(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted and not result.failed
