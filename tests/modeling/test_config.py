"""ModelConfig refuses what no model can be, before anything is built."""

import pytest
from pydantic import ValidationError

from tests.modeling.families import SIZES
from trifold.modeling.config import ModelConfig


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"family": "prefix"}, "encoder-decoder"),
        ({"dim": 0}, "greater than 0"),
        ({"dim": 32.5}, "valid integer"),
        ({"num_layers": "3"}, "valid integer"),
        ({"num_kv_heads": 3}, r"num_heads \(4\) must be a multiple of num_kv_heads \(3\)"),
        ({"head_dim": 7}, r"head_dim \(7\) must be even"),
        ({"norm_places": ("pre", "pre")}, "names a place twice"),
        ({"norm_places": ("before",)}, "'pre', 'inner' or 'post'"),
        ({"position": "alibi"}, "'sinusoidal'"),
        ({"dropout": 1.0}, "less than 1"),
        ({"attention_scale": 0.0}, "greater than 0"),
        ({"hidden_size": 32}, "not permitted"),
    ],
)
def test_what_cannot_be_is_refused_by_name(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelConfig(**SIZES | {"family": "decoder"} | wrong)


def test_a_configuration_never_changes_and_survives_json() -> None:
    config = ModelConfig(**SIZES, family="encoder", norm_places=("pre", "inner"))
    with pytest.raises(ValidationError, match="frozen"):
        config.dim = 64
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config
