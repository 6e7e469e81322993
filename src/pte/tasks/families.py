"""The registry of generated tasks: every family that `task.kind` can name, and what a base for several must know.

A new family is one module with a `Family` in it and a line here; its shape's parameters become fields of `TaskConfig`.
"""

from collections.abc import Sequence

from pte.tasks import chained, multiplication, permutation, recall
from pte.tasks.generated import Family

FAMILIES: dict[str, Family] = {
    family.name: family for family in (chained.FAMILY, recall.FAMILY, permutation.FAMILY, multiplication.FAMILY)
}


def joint_vocabulary(families: Sequence[Family]) -> list[str]:
    """Every token of several families, each once, in the order of its ids; of one family, its own vocabulary."""
    return list(dict.fromkeys(token for family in families for token in family.vocabulary()))
