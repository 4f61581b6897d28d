"""Gradient search over the tokens of a response: propose, regenerate, accept.

Hands out: `SearchConfig`, `NablaReasoner`, `run_search`, `run_search_with_shared_budget`, `SharedBudget`,
`search_to_folder`.
May import: utils, grading, tasks, states, models, gradient, rewards, engine, traces.
"""
