"""Thought adapters as adapters of PEFT: what a script imports.

`import pte` is enough for PEFT's own functions to accept peft_type PTE; a script imports `PTEConfig` to make such an
adapter and `policy_of` to roll out, replay and train it under its budget. `generate` of the PEFT model runs that
policy. A forward knows no budget: nothing is evicted and every token computes with the first state S_0, as the bounded
policy's prompt does. Merging is refused: the update depends on the sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pte.integrations.peft_config import PTEConfig
from pte.integrations.peft_tuner import PTEModel
from pte.lora_folder import start_from_lora
from pte.peft_folder import PEFT_TYPE, convert_from_peft, convert_to_peft

if TYPE_CHECKING:
    from peft import PeftModel

    from pte.model.policy import BoundedPolicy

__all__ = ["PTEConfig", "PTEModel", "convert_from_peft", "convert_to_peft", "policy_of", "start_from_lora"]


def policy_of(model: PeftModel) -> BoundedPolicy:
    """The bounded policy of a PEFT model's active adapter, under the budget of its configuration.

    Rollout, replay and training take it as any other. It stays the policy of this adapter when another one is made
    active or adapters are disabled; called while they are disabled, this is the base alone under the same budget.
    Another budget is `policy.with_cache(...)`.

    Args:
        model: With an adapter of peft_type PTE.

    Raises:
        ValueError: The adapter is of another method, or none is active.
    """
    tuner = model.base_model
    if not isinstance(tuner, PTEModel):
        raise ValueError(
            f"policy_of needs a model with an adapter of peft_type {PEFT_TYPE}, got {type(tuner).__name__}; make it "
            f"with get_peft_model(base, PTEConfig())"
        )
    return tuner.active_policy()
