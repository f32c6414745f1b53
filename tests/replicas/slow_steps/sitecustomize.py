"""Makes each step of a generator take STEP_SECONDS longer, on servers whose launcher has this folder on its PYTHONPATH.

A backend process sleeps, as one that waits for an accelerator, so that many of them share two cores. The launcher
copies the backends into a folder of its own; this changes the copy, because Triton's processes read no PYTHONPATH.
"""

import importlib.abc
import importlib.util
import os
import sys

MODULE = "trident_serving.launcher.backend_folder"
SLOW = """\
import time

from trident_serving.generation import decoder

run = decoder.OnnxDecoder.run


def slow(self, items):
    time.sleep({seconds})
    return run(self, items)


decoder.OnnxDecoder.run = slow
"""


class Finder(importlib.abc.MetaPathFinder):
    """Changes the launcher's module when it is imported."""

    def find_spec(self, name, path, target=None):
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_change(module):
            execute(module)
            prepare = module.prepare

            def prepare_slow(folder, installation):
                made = prepare(folder, installation)
                assert made == folder, "it would change what is installed"
                backend = made / "trident_generator/model.py"
                backend.write_text(SLOW.format(seconds=float(os.environ["STEP_SECONDS"])) + backend.read_text())
                return made

            module.prepare = prepare_slow

        spec.loader.exec_module = execute_and_change
        return spec


sys.meta_path.insert(0, Finder())
