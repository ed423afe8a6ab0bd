"""How a folder writes text: settings that come back from generation_config.json, and mean the same to the
stock class.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trifold.modeling.errors import UserError
from trifold.modeling.generation.config import Generation
from trifold.modeling.huggingface import decoding
from trifold.modeling.huggingface.generation import write_generation

SETTINGS = st.builds(
    Generation,
    max_new=st.integers(1, 500),
    min_new=st.integers(0, 5),
    no_repeat=st.integers(0, 4),
    beams=st.integers(1, 8),
    length_penalty=st.floats(-2, 2),
    sample=st.booleans(),
    temperature=st.floats(0.1, 2),
    top_k=st.integers(0, 50),
    top_p=st.floats(0.1, 1),
)


@given(SETTINGS)
def test_settings_come_back_from_the_folder(settings: Generation) -> None:
    drawn = (
        {} if settings.sample else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    )  # without draws these say nothing
    assert decoding({"bos_token_id": 1}, write_generation(settings)) == settings.model_copy(update=drawn)


def test_the_stock_class_knows_every_field_and_an_encoder_decoders_start_is_read() -> None:
    transformers = pytest.importorskip("transformers")
    settings = Generation(max_new=7, min_new=2, no_repeat=3, beams=4, length_penalty=0.5)
    stock = transformers.GenerationConfig(**write_generation(settings))
    assert (stock.max_new_tokens, stock.min_new_tokens, stock.no_repeat_ngram_size, stock.num_beams) == (
        7,
        2,
        3,
        4,
    )
    assert stock.length_penalty == 0.5 and not stock.do_sample
    message = {
        "is_encoder_decoder": True,
        "bos_token_id": 1,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": 2,
        "forced_bos_token_id": 9,
    }
    assert decoding(message, write_generation(settings)) == settings.model_copy(
        update={"start": 2, "first": 9, "end": True}
    )


@pytest.mark.parametrize(
    "fields",
    [{"temperature": 0.0}, {"top_k": -1}, {"top_p": 0}, {"temperature": "hot"}],
)
def test_settings_of_sampling_do_not_matter_where_nothing_is_drawn(fields: dict[str, object]) -> None:
    assert decoding({}, fields) == Generation()
    with pytest.raises(UserError, match=rf"sets {next(iter(fields))} = "):
        decoding({}, fields | {"do_sample": True})


def test_a_setting_out_of_range_is_named() -> None:
    with pytest.raises(UserError, match="sets num_beams = 0"):
        decoding({}, {"num_beams": 0})


def test_a_forced_end_of_a_decoder_is_read_from_its_generation_config() -> None:
    assert decoding({}, write_generation(Generation(end=True), eos=2)) == Generation(end=True)
