"""`trifold demo`: the whole pipeline on a generated toy corpus.

`world` writes the corpus: a small world of people, places and things, in sentences of `world_language`;
`world_tasks` writes examples of four tasks about it: question answering, NER, summarization, translation.
`demo` pretrains three models, kills and resumes a worker, publishes, verifies and fine-tunes.
"""
