"""One engine for many searches: each is a coroutine for one problem, and its requests join those of all others.

Hands out: `Engine`, `Task`, `TokenLogprobs`, `allocate`.
May import: states, models, gradient, rewards.
"""
