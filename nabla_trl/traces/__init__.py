"""Records of what a method did to a problem: the trace, its parquet shards, and rows for the trainers.

Hands out: `Trace`, `Revision`, `TraceWriter`, `read_traces`, `build_response_trace`, `grade_traces`, `build_sft_rows`,
`build_weighted_rows`, `build_preference_rows`.
May import: utils, grading, tasks, models.
"""
