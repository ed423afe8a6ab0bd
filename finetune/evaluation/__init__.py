"""Predictions and scores: a model and a task come in, predictions and scores go out.

    evaluate.py           a published folder as a model; scores, their intervals, and a baseline's
    model_selection.py    during training: scores of dev, the best checkpoint, and at the end test
    predict.py            a published model and texts of any kind -> what it makes of each

Training calls model_selection.py at every evaluation; `trifold evaluate` uses evaluate.py and `trifold
generate` predict.py.
"""
