"""`frfx` and `python -m frfx`: the command line, or what it takes to have one."""

import sys


def main() -> None:
    """Run the command line; its extra may be missing, for it is optional."""
    try:
        from frfx.cli import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"frfx: the command line needs {error.name}: pip install 'frfx[cli]'")
    app(prog_name="frfx")


if __name__ == "__main__":
    main()
