"""The benchmarks of ``minrl benchmark``: one module each, and what they measure and report with."""
