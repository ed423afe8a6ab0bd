"""`trifold bench`: measurements of this machine, next to Hugging Face models and SentencePiece.

`commands` are the options. `train`, `generate`, `data`, `save` and `gpu` measure one thing each; `contenders`
are the models that are raced step by step on the same `rows`; `profile` counts memory and time by torch's
profiler; `report` shows a table and writes OUT.json and OUT.png.
"""
