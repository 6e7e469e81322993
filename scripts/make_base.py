"""Makes a base that is not shipped, by its recipe in `pte.tasks.bases`.

    OMP_NUM_THREADS=1 python scripts/make_base.py recall models/recall

Trains it from scratch, measures it on held-out problems with Transformers' own `generate`, and writes weights,
tokenizer and `training.json`, which it shows in the end, into the folder. A folder that holds the whole base already
is left as it is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from pte.tasks.base_training import RECORD_FILE, print_step
from pte.tasks.bases import RECIPES, make_base


def main() -> None:
    """Makes one base."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", choices=sorted(RECIPES))
    parser.add_argument("folder", type=Path, help="where model and tokenizer go")
    parser.add_argument("--threads", type=int, default=1, help="other numbers may give other weights")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    make_base(options.base, options.folder, on_step=print_step)
    print((options.folder / RECORD_FILE).read_text())


if __name__ == "__main__":
    main()
