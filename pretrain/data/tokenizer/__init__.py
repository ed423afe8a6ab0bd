"""Text to token ids and back: a tokenizer folder (tokenizer.json, tokenizer_config.json) comes in.

    tokenizer.py        Tokenizer, what everybody else uses; `train` makes a folder from text
    special_tokens.py   the folder's files -> the special token of each role
    piece_tables.py     the vocabulary -> which pieces begin a word or end a sentence
    word_cache.py       texts -> ids, each word once; viterbi.py encodes new words, many at a time

Ids are those that the stock class of the published folder gives.
"""
