"""The command `pte`, and `python -m pte`: `cli.main`, and the doctor where not even that can be imported.

Decides: what is said where a package that reads the command line is missing or broken. Knows no package.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Runs the command line's command; returns its exit status."""
    try:
        from pte import cli
    except Exception as error:  # a broken package fails in any way that it likes
        if sys.argv[1:] == ["doctor"]:
            from pte.doctor.command import doctor

            return doctor(output=None)
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"pte: the command line cannot be read ({reason}); pte doctor, without flags, says more", file=sys.stderr)
        return 2
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
