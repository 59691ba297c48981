"""Settings: the sampling options of a chat, and who chose each: the user, the model or kvrun."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from kvrun.errors import InvalidRequest
from kvrun.runtime.sampling.params import SamplingParams, find, parse

# For a model that names no defaults of its own; 1.0 rambles with small models.
FALLBACK = {"temperature": 0.7}
# One answer of one conversation has no use for these.
NOT_IN_A_CONVERSATION = ("n", "logprobs")


class Setting(NamedTuple):
    name: str
    value: Any
    origin: str  # "you", "model" or "default"
    help: str


class Settings:
    """What the user chose, over the model's own defaults, over kvrun's."""

    def __init__(self, chosen: Mapping[str, Any]) -> None:
        """Raises InvalidRequest when a chosen value is out of its bounds."""
        self._chosen = dict(chosen)
        self._model: dict[str, Any] = {}
        SamplingParams(**self._chosen)

    def learn(self, model: Mapping[str, Any]) -> None:
        """Take a model's defaults; FALLBACK stands in for a temperature it does not name."""
        known = {field.name for field in fields(SamplingParams)}
        self._model = {k: v for k, v in model.items() if k in known}
        self.params()

    def params(self) -> SamplingParams:
        return self._with(self._chosen)

    def _with(self, chosen: Mapping[str, Any]) -> SamplingParams:
        return SamplingParams(**{**FALLBACK, **self._model, **chosen})

    def chosen(self, name: str) -> bool:
        """Whether the user chose a value for this option."""
        return name in self._chosen

    def set(self, name: str, text: str) -> Setting:
        """Choose a value written as text; "default" gives the choice back."""
        name = find(name).name
        if name in NOT_IN_A_CONVERSATION:
            raise InvalidRequest(
                f"{name} is not for a conversation.", hint=f"kvrun chat --json -o {name}=… PROMPT"
            )
        tried = {k: v for k, v in self._chosen.items() if k != name}
        if text.strip().lower() != "default":
            tried[name] = parse(name, text)
        self._with(tried)  # some options bound each other
        self._chosen = tried
        return next(setting for setting in self.all() if setting.name == name)

    def all(self) -> list[Setting]:
        """Every option that a conversation has, with its value and its origin."""
        params = self.params()
        return [
            Setting(o.name, getattr(params, o.name), self._origin(o.name), o.help)
            for o in SamplingParams.options()
            if o.name not in NOT_IN_A_CONVERSATION
        ]

    def _origin(self, name: str) -> str:
        if name in self._chosen:
            return "you"
        return "model" if name in self._model else "default"
