"""Generation: prompts in, continuations out.

config.py holds the settings. `generate` (generate.py) checks them and the prompts, and takes token after
token, greedily or by sampling; beam_search.py does so for beams. Both ask decoding.py for the
log-probabilities of the next token: it keeps the tokens so far and the caches of keys and values, and applies
what the settings forbid or force.
"""
