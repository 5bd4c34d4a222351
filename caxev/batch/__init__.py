"""Jobs that make one kind of data out of another, here or on a batch system.

`base` has the interface; `slurm`, `htcondor` and `pbs` implement it with `grouped`, and are named
in `caxev.config.processing.SYSTEMS`. Another batch system is added by the entry point group
``caxev.batch``: the name for ``system`` in sites.json, and the class. `derived` describes the job
of an entry, `folder` keeps the jobs' files, `runner` runs a job, there or on this machine,
`following` reports ends from logs, `work` has the steps for worker processes, `queue` sends jobs
together.
"""
