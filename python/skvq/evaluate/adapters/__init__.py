"""Bridges to evaluations from elsewhere: EleutherAI's lm-eval and LongBench."""
