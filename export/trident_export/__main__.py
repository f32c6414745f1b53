"""`python -m trident_export`, and `trident-export`."""

import sys


def main() -> int:
    """Run the command line, or say what the environment lacks for it."""
    try:
        from trident_export.store import commands

        if sys.argv[1:] and sys.argv[1] in commands.NAMES:  # they need no torch, which takes seconds to import
            return commands.main()
        from trident_export.cli import main as run

        return run()
    except ModuleNotFoundError as error:
        if (error.name or "trident").startswith("trident"):
            raise
        print(
            f"trident-export: the package {error.name} is missing: "
            f"install it with {sys.executable} -m pip install 'trident-serving[export]'",
            file=sys.stderr,
        )
        return 1


if __name__ == "__main__":
    sys.exit(main())
