"""What a run writes about itself, and the requests it listens to.

events.py is the table of events: each one's name, what it carries and the sentence that shows it. metrics.py
has the Recorder: rank 0 writes metrics.jsonl, events.jsonl and TensorBoard files; run_folder.py reads them
back (last step, last outcome) and queues scores that are made during training.
heartbeat.py keeps one small file per rank with its phase, step and host, which outlives a killed process;
memory_meter.py measures a rank's peak memory. stop_request.py says whether somebody asked the run to stop: by
a signal or by the file `stop` in the run folder.
"""
