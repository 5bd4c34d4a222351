"""Copies as files on this machine.

Which paths may be touched, what a tree holds, its digests, and how a copy is made to appear whole
under its final name. Knows neither the database nor the network.
"""

from caxev.files.confined import Confined, FarPath, beside, join, parent
from caxev.files.digest import digest_tree
from caxev.files.erasing import MOVED_PREFIX, empty_quarantine, erase, standing
from caxev.files.errors import changed, damaged, gone, local
from caxev.files.incoming import bring_in, landing, mirror, name_in, pinned, place_file
from caxev.files.manifest import PART, Item, Manifest, Range, item_digest
from caxev.files.meter import Meter, Moved, Report, to_nobody
from caxev.files.part_digest import PartDigest
from caxev.files.paths import (
    PART_PREFIX,
    check_names,
    confine,
    confine_entry,
    confine_own,
    inside,
    partial_path,
    printable,
    safe_name,
    shown,
)
from caxev.files.plan import Piece, Plan, plan, second
from caxev.files.private import is_bare, make_private, not_private
from caxev.files.process_lock import process_lock
from caxev.files.publishing import DIR_MODE, FILE_MODE, forget_lock, publish, writing
from caxev.files.resolved import open_resolved, opened
from caxev.files.roots import root_rows, roots_from, steady
from caxev.files.staging import (
    StagedCopy,
    check_expected,
    filling_up,
    is_file,
    known_items,
    make_parents,
)
from caxev.files.throttle import RateLimiter
from caxev.files.tree import Seen, check_rows, check_unchanged, look, look_source, manifest_of, scan

__all__ = [
    "DIR_MODE",
    "FILE_MODE",
    "MOVED_PREFIX",
    "PART",
    "PART_PREFIX",
    "Confined",
    "FarPath",
    "Item",
    "Manifest",
    "Meter",
    "Moved",
    "PartDigest",
    "Piece",
    "Plan",
    "Range",
    "RateLimiter",
    "Report",
    "Seen",
    "StagedCopy",
    "beside",
    "bring_in",
    "changed",
    "check_expected",
    "check_names",
    "check_rows",
    "check_unchanged",
    "confine",
    "confine_entry",
    "confine_own",
    "damaged",
    "digest_tree",
    "empty_quarantine",
    "erase",
    "filling_up",
    "forget_lock",
    "gone",
    "inside",
    "is_bare",
    "is_file",
    "item_digest",
    "join",
    "known_items",
    "landing",
    "local",
    "look",
    "look_source",
    "make_parents",
    "make_private",
    "manifest_of",
    "mirror",
    "name_in",
    "not_private",
    "open_resolved",
    "opened",
    "parent",
    "partial_path",
    "pinned",
    "place_file",
    "plan",
    "printable",
    "process_lock",
    "publish",
    "root_rows",
    "roots_from",
    "safe_name",
    "scan",
    "second",
    "shown",
    "standing",
    "steady",
    "to_nobody",
    "writing",
]
