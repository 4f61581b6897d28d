"""Scores of responses under a model, and their gradient by the response's tokens.

Hands out: `compute_token_gradient`, `Sample`, `Objective`, `LikelihoodObjective`, `ScoreObjective`,
`ProcessObjective`, `HeadObjective`, `StateHead`, `policy_likelihood`, `build_mixture`,
`compute_replaceable_mask`, `StepFinder`.
May import: utils, models, tasks, states.
"""
