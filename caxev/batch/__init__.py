"""Jobs that make one kind of data out of another, here or on a batch system.

`base` has the interface; `slurm` is Slurm, and `here` runs a job as a process of this machine. A
batch system of your own is found by the entry point group ``caxev.batch``: the name that
``system`` in sites.json is to have, and the class. `folder` keeps the jobs' files, `runner` is
what runs beside a job, `work` what handlers have worker processes do, `queue` sends jobs together.
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
