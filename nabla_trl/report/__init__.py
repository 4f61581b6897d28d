"""Reports: numbers, figures and pages from the rows and facts of an evaluation.

Hands out: `write_report_files`, `print_summary_table`, `summarize`.
May import: utils, grading, tasks, models, traces, audit, evaluation.
"""
