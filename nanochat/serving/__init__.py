"""Serving: many conversations over one model at once, behind an HTTP API that OpenAI's clients speak.

request.py    what is asked of the scheduler, and the events it answers with
scheduler.py  continuous batching: a thread that reads prompts in pieces and writes all rows together
sampling.py   each row its own options;  reply.py  ids -> visible text, stop strings, citations
prefix.py     states of prompts read before;  functions.py  calls of a client's own functions
prompts.py    messages -> prompt ids;  openai_api.py  request and response bodies
app.py        routes;  gate.py  who may ask, and how much;  metrics.py  what Prometheus reads
"""
