"""Helpers that need neither torch nor another package: files, locks, signals, progress, text and statistics.

Hands out: `write_atomic`, `lock_folder`, `claim_settings`, `hash_json`, `handle_stop_signals`, `ProgressDisplay`,
`Interval`, `proportion_interval`, `paired_difference`, `option`, `read_yaml`, `format_si`, `Checks`.
May import: nothing of nabla_trl.
"""
