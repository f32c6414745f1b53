"""What comes, and how soon it is to be answered."""

from __future__ import annotations

from dataclasses import dataclass

from trident_serving.errors import InvalidRequest

_MOST, _MOST_VARIED = 1e9, 1000.0


@dataclass(frozen=True)
class Traffic:
    """Requests to a generator.

    Attributes:
        rate: requests a second, at the busiest time that is to be served well.
        prompt_tokens: of a request, on average.
        answer_tokens: of an answer, on average.
        prompt_variation: standard deviation of the prompts' lengths over their mean.
        answer_variation: of the answers'.
        burstiness: standard deviation of the time from one request to the next over its mean; 1: by chance.
    """

    rate: float
    prompt_tokens: float
    answer_tokens: float
    prompt_variation: float = 1.0
    answer_variation: float = 0.8
    burstiness: float = 1.0

    def __post_init__(self) -> None:
        for name in ("rate", "prompt_tokens", "answer_tokens", "burstiness"):
            if not getattr(self, name) > 0:
                raise InvalidRequest(f"{name} must be more than 0, found {getattr(self, name):g}")
        for name in ("prompt_variation", "answer_variation"):
            if not getattr(self, name) >= 0:
                raise InvalidRequest(f"{name} must be 0 or more, found {getattr(self, name):g}")
        for name in ("rate", "prompt_tokens", "answer_tokens"):
            if getattr(self, name) > _MOST:
                raise InvalidRequest(f"{name} must be {_MOST:g} at most, found {getattr(self, name):g}")
        for name in ("prompt_variation", "answer_variation", "burstiness"):  # of which squares are taken
            if getattr(self, name) > _MOST_VARIED:
                raise InvalidRequest(f"{name} must be {_MOST_VARIED:g} at most, found {getattr(self, name):g}")


# Of the traces of two services that Azure has published (AzureLLMInferenceTrace, 2023, an hour each): what their files
# say, and the burstiness within two minutes, as the rate changes beyond.
KNOWN = {
    "chat": Traffic(5.53, 1155, 211, 0.96, 0.77, 1.03),
    "code": Traffic(2.57, 2048, 28, 0.96, 2.15, 6.42),
}


@dataclass(frozen=True)
class Targets:
    """How soon requests are to be answered.

    Attributes:
        first_token: seconds until `share` of the requests have their first token.
        token: seconds from one token to the next, on average at that load.
        share: of the requests that have it so soon.
        busy: the most that a replica may have to do, as a share of what fills all its slots: what is left is for those
            that are rolled or have died.
    """

    first_token: float = 1.0
    token: float = 0.2
    share: float = 0.99
    busy: float = 0.8

    def __post_init__(self) -> None:
        if not (self.first_token > 0 and self.token > 0):
            raise InvalidRequest("the times of targets must be more than 0")
        for name in ("share", "busy"):
            if not 0 < getattr(self, name) < 1:
                raise InvalidRequest(f"{name} must be between 0 and 1, found {getattr(self, name):g}")
