"""An OpenAI-compatible HTTP server at the client: applications talk to it as they would to a hosted model.

In the order of a request:

guard.py      who may ask: API key, host names, size of a body
requests.py   a JSON body -> what is asked for, or a sentence that says what is wrong with it
fields.py     what single fields of a body hold
work.py       one thread a choice over `client.generation.generate`; how many run, how many wait, who is cancelled
pieces.py     the text and bytes of single tokens, for log-probabilities
forms.py      what was generated -> OpenAI's JSON, by route
answer.py     a request's events, put together or passed on as they come
errors.py     our errors -> HTTP status and OpenAI's form
metrics.py    Prometheus metrics: numbers only
app.py        the routes
run.py        `serve`, and `Gateway` for programs that run one beside other things

Needs the extra `gateway` (starlette, uvicorn). No text and no token reaches a log or a metric.
"""
