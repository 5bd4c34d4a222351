"""Copies as files on this machine.

Which paths may be touched, what a tree holds, its digests, and how a copy is made to appear whole
under its final name. Knows neither the database nor the network.
"""

from caxev.files.digest import Report, digest_tree
from caxev.files.manifest import Difference, Item, Kind, Manifest
from caxev.files.paths import (
    PART_PREFIX,
    check_link,
    confine,
    inside,
    link_problem,
    partial_path,
    printable,
    safe_name,
)
from caxev.files.publishing import DIR_MODE, FILE_MODE, publish, rename_new, sync_tree, writing
from caxev.files.tree import Seen, check_links, look, manifest_of, scan, shown

__all__ = [
    "DIR_MODE",
    "FILE_MODE",
    "PART_PREFIX",
    "Difference",
    "Item",
    "Kind",
    "Manifest",
    "Report",
    "Seen",
    "check_link",
    "check_links",
    "confine",
    "digest_tree",
    "inside",
    "link_problem",
    "look",
    "manifest_of",
    "partial_path",
    "printable",
    "publish",
    "rename_new",
    "safe_name",
    "scan",
    "shown",
    "sync_tree",
    "writing",
]
