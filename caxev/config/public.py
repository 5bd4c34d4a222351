"""The names that `caxev.config` offers, each from the module that has it."""

from caxev.config.alarms import Email, Sink, Webhook
from caxev.config.archive import ArchiveOptions
from caxev.config.corrections import Correction
from caxev.config.data_types import DataType, DataTypes
from caxev.config.directories import jobs_directory, private_directories, state_directory
from caxev.config.handlers import BY_METHOD, DEFAULT_HANDLERS, load_file, load_handlers
from caxev.config.links import Link
from caxev.config.loading import find_sites, load_sites
from caxev.config.permissions import Permission
from caxev.config.processing import Processing
from caxev.config.retention import Deletion, Patrol, Stalled
from caxev.config.rucio import Catalogue, Period
from caxev.config.settings import Settings, secret, without_secrets
from caxev.config.sites import Site, Sites, archive_between, link_between
from caxev.core.errors import ConfigError

__all__ = [
    "BY_METHOD",
    "DEFAULT_HANDLERS",
    "ArchiveOptions",
    "Catalogue",
    "ConfigError",
    "Correction",
    "DataType",
    "DataTypes",
    "Deletion",
    "Email",
    "Link",
    "Patrol",
    "Period",
    "Permission",
    "Processing",
    "Settings",
    "Sink",
    "Site",
    "Sites",
    "Stalled",
    "Webhook",
    "archive_between",
    "find_sites",
    "jobs_directory",
    "link_between",
    "load_file",
    "load_handlers",
    "load_sites",
    "private_directories",
    "secret",
    "state_directory",
    "without_secrets",
]
