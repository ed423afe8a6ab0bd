"""Following a run from its folder: `progress` shows the growing metrics.jsonl and events.jsonl on the console
and gives the status of any run; `trackers` sends the same metrics to MLflow and Weights & Biases.
"""
