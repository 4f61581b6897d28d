"""Gradient search over the tokens of a response: propose, regenerate, accept.

Hands out: `SearchConfig`, `NablaReasoner`, `run_search`, `generate_traces`.
May import: utils, grading, tasks, states, models, gradient, rewards, engine, traces.
"""
