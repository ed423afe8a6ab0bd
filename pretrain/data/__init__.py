"""From text to batches: corpora come in, micro-batches for each rank go out, in this order.

    corpus.py         files, URLs and hub sets -> documents
    tokenizer/        documents -> token ids (and training a tokenizer)
    prepare.py        documents -> token shards, once, on the driver; shards.py is their format
    packing.py        lengths of documents -> which chunks share a row, and how many rows each block makes
    row_order.py      number of a row -> source, block and row in the block; keyed_random.py draws
    objectives/       chunks -> inputs and targets of a segment
    rows.py           number of a row -> that row, with all of the above; collate.py puts segments into rows
    stages.py         step -> its rows; loader.py prepares each rank's share ahead of the step

Row i is a pure function of (content, seed, i): there is no loader state.
"""
