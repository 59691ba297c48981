"""Who chose a sampling option, and what is refused."""

import pytest

from kvrun.chat.settings import FALLBACK, NOT_IN_A_CONVERSATION, Settings
from kvrun.errors import InvalidRequest
from kvrun.runtime.sampling.params import SamplingParams


def origins(settings: Settings) -> dict[str, tuple[object, str]]:
    return {s.name: (s.value, s.origin) for s in settings.all()}


def test_the_user_goes_before_the_model_and_the_model_before_kvrun() -> None:
    settings = Settings({"top_k": 7})
    assert settings.params() == SamplingParams(top_k=7, **FALLBACK)
    settings.learn({"temperature": 0.2, "top_k": 50, "top_p": 0.9, "unknown": 1})
    assert settings.params() == SamplingParams(temperature=0.2, top_k=7, top_p=0.9)
    found = origins(settings)
    assert found["top_k"] == (7, "you")
    assert found["top_p"] == (0.9, "model")
    assert found["min_p"] == (0.0, "default")


def test_setting_and_giving_back() -> None:
    settings = Settings({})
    settings.learn({"temperature": 0.0})
    assert settings.set("temperature", "1.5").value == 1.5
    assert settings.set("top-k", "9").origin == "you"
    assert settings.chosen("top_k")
    assert settings.set("temperature", "default") == next(
        s for s in settings.all() if s.name == "temperature"
    )
    assert origins(settings)["temperature"] == (0.0, "model")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("temperature", "-1", "temperature is -1"),
        ("temprature", "1", "no sampling option 'temprature'"),
        ("top_k", "many", "top_k is 'many'"),
        ("min_tokens", "9", "min_tokens is 9; it must be at most max_tokens"),
        *((name, "2", f"{name} is not for a conversation") for name in NOT_IN_A_CONVERSATION),
    ],
)
def test_a_refused_value_changes_nothing(name: str, text: str, words: str) -> None:
    settings = Settings({"max_tokens": 5})
    before = settings.params()
    with pytest.raises(InvalidRequest, match=words):
        settings.set(name, text)
    assert settings.params() == before


def test_values_are_checked_before_any_model_is_known() -> None:
    with pytest.raises(InvalidRequest, match="top_p is 2"):
        Settings({"top_p": 2})
