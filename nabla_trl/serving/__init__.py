"""Answer HTTP requests in the formats of OpenAI's completions and chat completions, with one search for many at once.

Hands out: `SearchService`, `ServerLimits`, `ChatService`, `run_server`.
May import: utils, tasks, models, rewards, engine, traces, search.
"""
