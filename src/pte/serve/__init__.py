"""A server that speaks the OpenAI completions API over the rollout engine, in memory that is fixed when it starts.

May import: fastapi, uvicorn (extra `serve`), and all of pte below the commands; nothing of pte but the command imports
it. Start with `body.py` (what may be asked), then `worker.py` (the thread that owns the engines), then `app.py`.
"""
