"""A trained checkpoint as a folder that loads without its run, with a model card and a generation method.

Hands out: `find_checkpoint`, `export_checkpoint`, `push_exported_folder`, `generate`.
May import: utils, tasks, models, rewards, traces, search, training, evaluation.
"""
