"""Copies as files on this machine.

Which paths may be touched, what a tree holds, its digests, and how a copy is made to appear whole
under its final name. Knows neither the database nor the network.
"""

from caxev.files.digest import digest_tree, to_nobody, wrong_below
from caxev.files.erasing import (
    GONE_PREFIX,
    MOVED_PREFIX,
    NOTHING,
    QUARANTINE,
    distinct,
    empty_quarantine,
    erase,
    quarantine_of,
    set_aside,
    standing,
)
from caxev.files.errors import Replaced, damaged, local
from caxev.files.identity import identity
from caxev.files.incoming import (
    apart,
    bring_in,
    copy_file,
    forget_incoming,
    landing,
    link_file,
    mirror,
    name_in,
    pinned,
    place_file,
)
from caxev.files.manifest import PART, Difference, Item, Kind, Manifest, Range, item_digest
from caxev.files.moved import Moved
from caxev.files.part_digest import PartDigest
from caxev.files.paths import (
    PART_PREFIX,
    RESERVED,
    check_link,
    check_names,
    confine,
    confine_own,
    inside,
    link_problem,
    own_name,
    partial_path,
    printable,
    safe_name,
    within_tree,
)
from caxev.files.places import overlapping, places
from caxev.files.plan import Piece, Plan, plan, second, to_the_second
from caxev.files.private import lies_in, make_private, not_private
from caxev.files.process_lock import process_lock
from caxev.files.publishing import DIR_MODE, FILE_MODE, publish, rename_new, sync_tree, writing
from caxev.files.reading import Report
from caxev.files.resolved import open_resolved, read_file
from caxev.files.roots import MARKER_PREFIX, root_rows, roots_from, steady
from caxev.files.space import lacking
from caxev.files.staging import (
    MARGIN,
    Arrival,
    check_expected,
    check_standing,
    enough_space,
    filling_up,
    is_file,
    join,
    known_items,
    make_parents,
)
from caxev.files.throttle import Brake, idle_disk
from caxev.files.tree import Seen, check_links, check_paths, look, manifest_of, scan, shown

__all__ = [
    "DIR_MODE",
    "FILE_MODE",
    "GONE_PREFIX",
    "MARGIN",
    "MARKER_PREFIX",
    "MOVED_PREFIX",
    "NOTHING",
    "PART",
    "PART_PREFIX",
    "QUARANTINE",
    "RESERVED",
    "Arrival",
    "Brake",
    "Difference",
    "Item",
    "Kind",
    "Manifest",
    "Moved",
    "PartDigest",
    "Piece",
    "Plan",
    "Range",
    "Replaced",
    "Report",
    "Seen",
    "apart",
    "bring_in",
    "check_expected",
    "check_link",
    "check_links",
    "check_names",
    "check_paths",
    "check_standing",
    "confine",
    "confine_own",
    "copy_file",
    "damaged",
    "digest_tree",
    "distinct",
    "empty_quarantine",
    "enough_space",
    "erase",
    "filling_up",
    "forget_incoming",
    "identity",
    "idle_disk",
    "inside",
    "is_file",
    "item_digest",
    "join",
    "known_items",
    "lacking",
    "landing",
    "lies_in",
    "link_file",
    "link_problem",
    "local",
    "look",
    "make_parents",
    "make_private",
    "manifest_of",
    "mirror",
    "name_in",
    "not_private",
    "open_resolved",
    "overlapping",
    "own_name",
    "partial_path",
    "pinned",
    "place_file",
    "places",
    "plan",
    "printable",
    "process_lock",
    "publish",
    "quarantine_of",
    "read_file",
    "rename_new",
    "root_rows",
    "roots_from",
    "safe_name",
    "scan",
    "second",
    "set_aside",
    "shown",
    "standing",
    "steady",
    "sync_tree",
    "to_nobody",
    "to_the_second",
    "within_tree",
    "writing",
    "wrong_below",
]
