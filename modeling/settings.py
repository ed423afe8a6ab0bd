"""Settings: the base class of every group of settings, in recipes and in models."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A frozen, strictly typed group of settings that rejects unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
