"""A run on Ray: `driver.run` starts groups of workers, one after another, until the run is finished.

`connection` joins a cluster or starts one here, `capacity` counts the workers that fit. `attempt` runs one
group: each worker (`worker`) becomes a rank and calls the training function. `failure_report` makes a page of
what went wrong from the ranks' heartbeats and finds hanging ranks. `scoring_actor` scores checkpoints
meanwhile with `scorer`, which also works without Ray. `tokenize_tasks` tokenizes on all nodes. `timing` holds
the waiting times.
"""
