"""Reads the examples of tasks: a file or a hub set comes in, checked examples go out.

    records.py      files and hub sets -> records, each with the file and line that it came from
    pairs.py        records -> pairs of a source and its targets (translation, summarization)
    conll.py        CoNLL files and hub sets -> tagged sentences in IOB2 (named entities)
    squad.py        SQuAD files and hub sets -> questions with their answers
    cloze.py        questions -> more questions, made of their contexts
    words.py        where the words and graphemes of a text begin and end, in every script
    sentences.py    where the sentences of a text begin and end

An unusable example is a UserError that names its file and line. finetune/tasks turns examples into segments.
"""
