"""The settings of generation."""

from pydantic import Field, NonNegativeInt

from trifold.modeling.settings import Settings


class Generation(Settings):
    """How text is generated: greedily, unless `sample` or `beams` is set."""

    max_new: int = Field(default=128, gt=0)  # the most new tokens
    cut_prompt: bool = (
        False  # cut a prompt that is longer than the model's positions, instead of rejecting it
    )
    min_new: int = Field(default=0, ge=0)  # new tokens before the text may end
    no_repeat: int = Field(default=0, ge=0)  # no n-gram of this length occurs twice, prompt included; 0: off
    beams: int = Field(default=1, gt=0)
    length_penalty: float = 1.0  # a beam's score is the sum of its log-probabilities / length ** this
    num_best: int = Field(default=1, gt=0)  # how many of the beams `hypotheses` returns
    start: int | None = Field(default=None, ge=0)  # an encoder-decoder's decoder_start_token; None: bos
    first: int | None = Field(default=None, ge=0)  # forced first token, such as a language's code
    more_ends: tuple[NonNegativeInt, ...] = ()  # tokens that end a text, besides the tokenizer's end token
    end: bool = False  # force the end token as the last token that `max_new` allows
    sample: bool = False
    temperature: float = Field(default=1.0, gt=0)
    top_k: int = Field(default=0, ge=0)  # sample among the k most likely tokens; 0: among all
    top_p: float = Field(
        default=1.0, gt=0, le=1
    )  # sample among the most likely tokens of this total probability
    seed: int = Field(default=0, ge=0)
