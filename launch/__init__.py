"""Where a run happens: the command line, recipes and Ray."""

import os

# Read by Ray when it is imported, which only modules of this room do. Its own defaults: a look at the workers
# every 2 s, minutes until a silent one counts as dead, a changed working directory, prints through its
# logger, one more process that watches for drained hosts.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ |= {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # no line of Ray's own between ours: this driver tells of a dead worker in one sentence
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
}
