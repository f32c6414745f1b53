"""Makes each step of a generator take STEP_SECONDS longer, in processes that have this folder on their PYTHONPATH.

They sleep, as an engine does that waits for an accelerator, so that many of them share two cores.
"""

import importlib.abc
import importlib.util
import os
import sys
import time

MODULE = "trident_serving.generation.decoder"
SECONDS = float(os.environ["STEP_SECONDS"])


class Finder(importlib.abc.MetaPathFinder):
    """Changes the decoder when it is imported."""

    def find_spec(self, name, path, target=None):
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_change(module):
            execute(module)
            run = module.OnnxDecoder.run

            def slow(decoder, items):
                time.sleep(SECONDS)
                return run(decoder, items)

            module.OnnxDecoder.run = slow

        spec.loader.exec_module = execute_and_change
        return spec


sys.meta_path.insert(0, Finder())
