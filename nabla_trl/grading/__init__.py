"""Find the final answer in a response and compare it with the gold answer, by math-verify where needed.

Hands out: `extract_answer`, `extract_strict_answer`, `AnswerChecker`, `MatchResult`.
May import: nothing of nabla_trl.
"""
