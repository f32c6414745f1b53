"""As much of vLLM's interface as our worker uses, over a model that says its prompt again and again.

It lets the tests run the real worker, its protocol and all that is around it without vLLM. What is asked of it, and
what becomes of that, goes into the file that VLLM_STAND_IN_LOG names, a JSON object in each line.
"""

import json
import os

__version__ = "0.0"
VOCABULARY = 512


def note(**what: object) -> None:
    """Add a line to the log."""
    if path := os.environ.get("VLLM_STAND_IN_LOG"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(what) + "\n")
