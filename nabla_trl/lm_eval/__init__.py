"""EleutherAI's lm-eval with the search inside: `lm_eval --model nabla`.

Releases of lm-eval after 0.4.13 find the model by the entry point `lm_eval.models`. Earlier ones have no way to find a
model of another package. For them `python -m nabla_trl.lm_eval` registers it, and then runs lm-eval's own command.

Hands out: `NablaLM`, `HarnessModel`, `grade_log`.
May import: utils, tasks, models, rewards, engine, traces, search, baselines, audit, evaluation, serving.
"""
