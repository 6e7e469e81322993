"""One memory reading in a process of its own: `python -m pte.bench.memory_process '{"preset": ..., "arm": ...}'`."""

from __future__ import annotations

import json
import sys

from pte.bench.memory import step_growth_bytes
from pte.bench.presets import Preset


def main(request: str) -> None:
    """Prints {"growth_bytes": n}."""
    fields = json.loads(request)
    preset = Preset.from_json(fields["preset"])
    growth = step_growth_bytes(preset, fields["arm"], tokens=fields["tokens"])
    print(json.dumps({"growth_bytes": growth}))


if __name__ == "__main__":
    main(sys.argv[1])
