"""Progressive Thought Encoding: train reasoning models by RL under a fixed KV cache."""
