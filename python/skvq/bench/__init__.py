"""Benchmarks behind `skvq bench …`: attend, encode, step, growth, generate. Each returns a JSON-ready report
(`machine.make_report`).
"""
