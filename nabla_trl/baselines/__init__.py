"""Methods to compare the search with: samples from one pool, and step-level searches with the reward as verifier.

Hands out: `draw_pool`, `select_best_of_n`, `select_weighted_best_of_n`, `vote_in_pool`, `decode_greedily`,
`draw_allocated_pool`, `run_step_search`, `BaselineConfig`.
May import: utils, grading, tasks, states, models, gradient, rewards, engine, traces.
"""
