"""One engine for many searches: each is written for one problem, and its requests join those of all others.

Hands out: `Engine`, `Task`.
May import: tasks, models, gradient, rewards.
"""
