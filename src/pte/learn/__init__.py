"""From rollouts to an update: rewards, advantages, the policy loss, distillation, the training loop.

`rewards.py` scores completions (`math_worker.py` is its child process), `advantages.py` compares them within
their group, `loss.py` turns per-token log-probs into a scalar, `distill.py` warms an adapter up on given traces,
`trainer.py` runs the steps. The first four import no other room of pte and not Transformers; `distill.py` and
`trainer.py` sit on top of every room but `cli.py`. Start with `loss.py`, then `trainer.py`.
"""
