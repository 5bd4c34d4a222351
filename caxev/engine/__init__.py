"""The listener: it follows the stream, records reactions, runs them and settles them.

A change goes from `watcher` by `recorder` (which asks `core.recording`) to the database, and from
there by `dispatcher` and `runner` to the handler; `settling` writes the end. Around them:

- `listener`, `lease`, `session`: the process, its lease, and what acts while that is ours;
- `context`, `options`: what they share, and what a reload changes;
- `requests`: what people ask for by the command line;
- `lanes`, `run_locks`, `attempt`, `ports`: the parts of running;
- `workers`, `worker`: processes for heavy work, and their far end;
- `root_markers`, `root_watch`: which disks are mounted;
- `trouble`, `malformed`, `watchdog`: what goes wrong, and is reported.

The engine knows neither handlers nor catalogues, tape and batch systems.
"""
