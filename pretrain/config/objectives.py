"""The `objective` of a recipe as a typed, frozen config. data/objectives/ has the code of each kind."""

from collections import Counter
from typing import Annotated, Literal

from pydantic import Field, model_validator

from trifold.modeling.config import Family
from trifold.modeling.settings import Settings


class ObjectiveConfig(Settings):
    """What every objective has."""

    weight: float = Field(default=1.0, gt=0)  # its share of the chunks in a mixture; unused outside of one

    @property
    def label(self) -> str:
        """The name of its losses: the mode, else the kind."""
        kind: str = self.kind  # type: ignore[attr-defined]
        return getattr(self, "mode", None) or kind


class CausalConfig(ObjectiveConfig):
    """Predict each next token."""

    kind: Literal["causal"] = "causal"


class PrefixConfig(ObjectiveConfig):
    """Predict each next token after a random point of the chunk; the text before it is context (Raffel et al.
    2020).
    """

    kind: Literal["prefix"] = "prefix"


class FimConfig(ObjectiveConfig):
    """Fill in the middle (Bavarian et al. 2022) in every chunk. The paper's rate is this member's weight in a
    mixture with a causal member.
    """

    kind: Literal["fim"] = "fim"
    # the fraction in the order suffix, prefix, middle; the rest is prefix, suffix, middle
    suffix_first: float = Field(default=0.5, ge=0, le=1)


class MaskedConfig(ObjectiveConfig):
    """Predict a fraction `rate` of the tokens, of which a fraction `mask` becomes the mask token, a fraction
    `random` a random token, and the rest stays (BERT).
    """

    kind: Literal["masked"] = "masked"
    rate: float = Field(default=0.3, gt=0, lt=1)
    mask: float = Field(default=0.8, ge=0, le=1)
    random: float = Field(default=0.1, ge=0, le=1)
    whole_words: bool = False

    @model_validator(mode="after")
    def _check_fractions(self) -> "MaskedConfig":
        if self.mask + self.random > 1:
            raise ValueError(f"mask ({self.mask}) and random ({self.random}) together exceed 1")
        return self


class SpansConfig(ObjectiveConfig):
    """Predict hidden spans, each marked by a sentinel (T5): a fraction `density` of the tokens, in spans of
    `mean_length` on average.
    """

    kind: Literal["spans"] = "spans"
    density: float = Field(default=0.15, gt=0, lt=1)
    mean_length: float = Field(default=3.0, ge=1)
    # UL2's name of the denoiser, which the model reads as a token before the text
    mode: Literal["R", "S", "X"] | None = None


class ContinuationConfig(ObjectiveConfig):
    """Predict the end of a chunk, a fraction `density` of it, from its beginning: UL2's S-denoiser, a prefix
    LM for an encoder-decoder.
    """

    kind: Literal["continuation"] = "continuation"
    density: float = Field(default=0.25, gt=0, lt=1)
    mode: Literal["R", "S", "X"] | None = None


class InfillingConfig(ObjectiveConfig):
    """Write the original text, of which spans were replaced by one mask each and sentences were permuted
    (BART).
    """

    kind: Literal["infilling"] = "infilling"
    density: float = Field(default=0.3, gt=0, lt=1)
    mean_length: float = Field(default=3.0, ge=1)  # lengths are Poisson distributed, 0 included
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
    """Several objectives for one family of models: each chunk of text goes to one of them, in proportion to
    their weights.
    """

    kind: Literal["mixture"] = "mixture"
    parts: tuple[SingleObjective, ...] = Field(min_length=2)  # its members

    @model_validator(mode="after")
    def _check_one_family(self) -> "MixtureConfig":
        families = {member.kind: FAMILIES[member.kind] for member in self.parts}
        if len(set(families.values())) > 1:
            listed = ", ".join(f"{kind} trains family {family}" for kind, family in families.items())
            raise ValueError(f"the parts of a mixture must train one family of models, but {listed}")
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


def mixture_members(objective: AnyObjective) -> tuple[SingleObjective, ...]:
    """The members of a mixture; any other objective by itself."""
    return objective.parts if isinstance(objective, MixtureConfig) else (objective,)


def family_of(objective: AnyObjective) -> Family:
    """The family of models that an objective trains."""
    return FAMILIES[mixture_members(objective)[0].kind]


def member_labels(objective: AnyObjective) -> list[str]:
    """A unique name for each member: its label, with a number where several have the same."""
    labels = [member.label for member in mixture_members(objective)]
    totals, seen = Counter(labels), Counter[str]()
    unique = []
    for label in labels:
        seen[label] += 1
        unique.append(f"{label}-{seen[label]}" if totals[label] > 1 else label)
    return unique
