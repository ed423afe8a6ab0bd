"""What an objective is, as plain values: the `objective` of a recipe."""

from collections import Counter
from typing import Annotated, Literal

from pydantic import Field, model_validator

from trifold.modeling.config import Family
from trifold.modeling.settings import Settings


class ObjectiveConfig(Settings):
    """What every objective has."""

    weight: float = Field(default=1.0, gt=0)  # its share of the pieces in a mixture; alone it means nothing

    @property
    def label(self) -> str:
        """What its losses are called."""
        kind: str = self.kind  # type: ignore[attr-defined]
        return getattr(self, "mode", None) or kind


class CausalConfig(ObjectiveConfig):
    """Predict each next token."""

    kind: Literal["causal"] = "causal"


class PrefixConfig(ObjectiveConfig):
    """Predict each next token after a point drawn anywhere in the piece; what stands before it is context
    (Raffel et al. 2020).
    """

    kind: Literal["prefix"] = "prefix"


class FimConfig(ObjectiveConfig):
    """Fill in the middle (Bavarian et al. 2022) in every piece: the paper's rate is this part's weight beside
    a causal part.
    """

    kind: Literal["fim"] = "fim"
    suffix_first: float = Field(
        default=0.5, ge=0, le=1
    )  # the share in the order suffix, prefix, middle; the rest prefix, suffix, middle


class MaskedConfig(ObjectiveConfig):
    """Predict hidden tokens: of `rate` of the tokens, `mask` become the mask, `random` a random token, the
    rest stay (BERT).
    """

    kind: Literal["masked"] = "masked"
    rate: float = Field(default=0.3, gt=0, lt=1)
    mask: float = Field(default=0.8, ge=0, le=1)
    random: float = Field(default=0.1, ge=0, le=1)
    whole_words: bool = False

    @model_validator(mode="after")
    def _shares(self) -> "MaskedConfig":
        if self.mask + self.random > 1:
            raise ValueError(f"mask ({self.mask}) and random ({self.random}) together exceed 1")
        return self


class SpansConfig(ObjectiveConfig):
    """Predict hidden spans, each named by a sentinel (T5): `density` of the tokens in spans of `mean_length`
    on average.
    """

    kind: Literal["spans"] = "spans"
    density: float = Field(default=0.15, gt=0, lt=1)
    mean_length: float = Field(default=3.0, ge=1)
    mode: Literal["R", "S", "X"] | None = (
        None  # UL2's name of the denoiser, told to the model by a token of its own
    )


class ContinuationConfig(ObjectiveConfig):
    """Predict the end of a piece, `density` of it, from its beginning: UL2's S-denoiser, a prefix LM for an
    encoder-decoder.
    """

    kind: Literal["continuation"] = "continuation"
    density: float = Field(default=0.25, gt=0, lt=1)
    mode: Literal["R", "S", "X"] | None = None


class InfillingConfig(ObjectiveConfig):
    """Write the whole text again, of which spans were replaced by one mask each and the sentences put in
    another order (BART).
    """

    kind: Literal["infilling"] = "infilling"
    density: float = Field(default=0.3, gt=0, lt=1)
    mean_length: float = Field(default=3.0, ge=1)  # lengths are Poisson numbers, 0 among them
    permute_sentences: bool = True


SingleObjective = Annotated[
    CausalConfig
    | PrefixConfig
    | FimConfig
    | MaskedConfig
    | SpansConfig
    | ContinuationConfig
    | InfillingConfig,
    Field(discriminator="kind"),
]
FAMILIES: dict[str, Family] = {
    "causal": "decoder",
    "prefix": "decoder",
    "fim": "decoder",
    "masked": "encoder",
    "spans": "encoder-decoder",
    "continuation": "encoder-decoder",
    "infilling": "encoder-decoder",
}


class MixtureConfig(Settings):
    """Several objectives for one family of models: each piece of text goes to one of them, as often as their
    weights say.
    """

    kind: Literal["mixture"] = "mixture"
    parts: tuple[SingleObjective, ...] = Field(min_length=2)

    @model_validator(mode="after")
    def _one_family(self) -> "MixtureConfig":
        families = {part.kind: FAMILIES[part.kind] for part in self.parts}
        if len(set(families.values())) > 1:
            said = ", ".join(f"{kind} a model of family {family}" for kind, family in families.items())
            raise ValueError(f"the parts of a mixture train one model, and here {said}")
        return self


AnyObjective = Annotated[
    CausalConfig
    | PrefixConfig
    | FimConfig
    | MaskedConfig
    | SpansConfig
    | ContinuationConfig
    | InfillingConfig
    | MixtureConfig,
    Field(discriminator="kind"),
]


def mixture_members(dials: AnyObjective) -> tuple[SingleObjective, ...]:
    """The objectives that a mixture has, or the one there is."""
    return dials.parts if isinstance(dials, MixtureConfig) else (dials,)


def family_of(dials: AnyObjective) -> Family:
    """The family of models that an objective trains."""
    return FAMILIES[mixture_members(dials)[0].kind]


def member_labels(dials: AnyObjective) -> list[str]:
    """A name for each part: its mode, else its kind, numbered where several have the same."""
    names = [part.label for part in mixture_members(dials)]
    often, seen = Counter(names), Counter[str]()
    numbered = []
    for name in names:
        seen[name] += 1
        numbered.append(f"{name}-{seen[name]}" if often[name] > 1 else name)
    return numbered
