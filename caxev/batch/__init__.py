"""Jobs that make one kind of data out of another, here or on a batch system.

`base` has the interface, `slurm` implements it for Slurm, and `here` runs a job as a process of
this machine. Another batch system is added by the entry point group ``caxev.batch``: the name for
``system`` in sites.json, and the class. `folder` keeps the jobs' files, `runner` runs beside a job,
`work` has the steps for worker processes, `queue` sends jobs together.
"""

from caxev.batch.base import BatchSystem, End, Ended, JobSpec
from caxev.batch.folder import INPUT, OUTPUT, Folder, Place, work_directory
from caxev.batch.here import run_here
from caxev.batch.queue import Queue, Send, Sent
from caxev.batch.runner import report
from caxev.batch.systems import system
from caxev.batch.work import Found, Product, Stock, check, look, send, take_stock, withdraw

__all__ = [
    "INPUT",
    "OUTPUT",
    "BatchSystem",
    "End",
    "Ended",
    "Folder",
    "Found",
    "JobSpec",
    "Place",
    "Product",
    "Queue",
    "Send",
    "Sent",
    "Stock",
    "check",
    "look",
    "report",
    "run_here",
    "send",
    "system",
    "take_stock",
    "withdraw",
    "work_directory",
]
