"""What a run hands on: a trained checkpoint with a model card and a generation method, and cards of traces.

Hands out: `find_checkpoint`, `export_checkpoint`, `push_exported_folder`, `generate`.
May import: utils, tasks, models, rewards, traces, search, training, evaluation, report.
"""
