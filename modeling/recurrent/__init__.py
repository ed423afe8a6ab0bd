"""Recurrent models (RNN, LSTM, GRU, with or without attention) behind the interface of a transformer's stack.

documents.py turns the segments of packed rows into documents side by side, step by step. stack.py runs a
recurrent layer over them and returns hidden states, in place of transformer.py's Stack; its alignments attend
to the source. crf.py scores sequences of labels on the hidden states, for the head.
"""
