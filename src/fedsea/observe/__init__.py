"""What a run tells people and machines: logging, metrics, progress. Numbers and names only, never text.

logging.py      `configure`, called once by the command; library modules only ask for a logger
observers.py    who watches a client's run, and telling several of them
run_log.py      metrics.jsonl, TensorBoard and the resolved plan in a run folder
recorders.py    what of a client's or server's run goes into its folder
snapshots.py    how a server stands at one moment
progress.py     the terminal: a live display, plain lines, or nothing
figures.py      how bytes, durations and rates are written
metrics.py      the server's Prometheus metrics
"""
