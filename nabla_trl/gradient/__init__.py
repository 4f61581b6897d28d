"""Scores of responses under a model, and their gradient by the response's tokens.

Hands out: `compute_token_gradient`, `Sample`, `Objective`, `LikelihoodObjective`, `ScoreObjective`,
`ProcessObjective`, `build_mixture`, `StepFinder`.
May import: models, tasks.
"""
