"""Answer HTTP requests in the format of OpenAI's chat completions, with one search for many requests at once.

Hands out: `SearchService`, `ServerLimits`, `ChatService`, `run_server`.
May import: utils, tasks, models, rewards, engine, traces, search.
"""
