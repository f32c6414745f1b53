"""Where vLLM's stats go."""


class StatLoggerBase:
    """One who hears of them."""
