"""Policies: load them, write prompts, generate tokens here or on a vLLM server, and count FLOPs.

Hands out: `load_policy`, `freeze_policy`, `Policy`, `GenerationBackend`, `connect_vllm`, `GenerationRequest`,
`generate_continuations`, `Sampling`, `PromptOptions`, `FlopCounter`.
May import: utils, grading, tasks, states.
"""
