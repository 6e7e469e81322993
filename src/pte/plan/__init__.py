"""What a run will need before it is started: device and host memory by kind and phase, and the time at the roofline.

May import everything that says what a run is (configuration, method, sizes of models) and nothing that runs one. Start
with `memory.py`: what is planned; then `update_memory.py` and `rollout_memory.py`: what is alive in each phase.
"""
