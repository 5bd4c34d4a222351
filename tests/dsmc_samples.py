"""What ``dsmc`` writes, by public sources: IBM's pages, users' logs, and others' glue code.

Spacing is that of the sources. How each run of the client ended is said beside it.
"""

# ruff: noqa: E501  # lines as they came

from __future__ import annotations

from attrs import frozen

BANNER = """\
IBM Storage Protect
Command Line Backup-Archive Client Interface
  Client Version 8, Release 1, Level 25.0
  Client date/time: 2024-12-17 16:52:58
(c) Copyright IBM Corp. 1990, 2024. All Rights Reserved.

Node Name: TESTING_NODE
Session established with server SERVER-2: Linux/x86_64
  Server Version 8, Release 1, Level 21.000
  Server date/time: 2024-12-17 17:52:58  Last access: 2024-12-17 17:52:50

Accessing as node: OTHER_NODE
"""
BACKUP = """\
Incremental backup of volume '/data'
Normal File-->            85,113 /data/a [Sent]
Normal File-->         1,756,058 /data/b  Changed
Retry # 1  Normal File-->         1,758,725 /data/b [Sent]
ANS1898I ***** Processed     3,000 files *****
Successful incremental backup of '/data'

Total number of objects inspected:        3,002
Total number of objects backed up:            2
Total number of objects updated:              0
Total number of objects rebound:              0
Total number of objects deleted:              0
Total number of objects expired:              0
Total number of objects failed:               0
Total number of objects encrypted:            0
Total number of objects grew:                 0
Total number of retries:                      0
Total number of bytes inspected:           4.00 KB
Total number of bytes transferred:            0  B
Data transfer time:                        0.00 sec
Network data transfer rate:                0.00 KB/sec
Aggregate data transfer rate:              0.00 KB/sec
Objects compressed by:                        0%
Total data reduction ratio:              100.00%
Elapsed processing time:               00:00:19
"""
FAILED_BACKUP = BACKUP.replace(
    "ANS1898I",
    "ANS1228E Sending of object '/data/c' failed.\n"
    "ANS4037E Object '/data/c' changed during processing.\nObject skipped.\nANS1898I",
).replace(
    "Successful incremental backup of '/data'",
    "ANS1802E Incremental backup of '/data' finished with 1 failure(s)",
)
RESTORE = """\
Restore function invoked.

ANS1247I Waiting for files from the server...
Restoring         1,200,227 /fs0/x --> /fs1/x [Done]

Restore processing finished.

Total number of objects restored:       6,491
Total number of objects failed:             0
Total number of bytes transferred:       2.37 GB
Data transfer time:                      9.74 sec
Network data transfer rate:        254,743.14 KB/sec
Aggregate data transfer rate:       79,174.32 KB/sec
Elapsed processing time:             00:00:31
"""
INTERRUPTED = """\
Restore function invoked.

ANS1247I Waiting for files from the server...
Restoring         1,200,227 /fs0/x --> /fs1/x [Done]
>>>>>> Restore Processing Interrupted!! <<<<<<
ANS1330S This node currently has a pending restartable restore session.
"""
QUERY = """\
           Size        Backup Date                Mgmt Class           A/I File
           ----        -----------                ----------           --- ----
         4,096  B  07/12/2020 14:09:12             STANDARD             A  /backup/x
"""
DETAIL = """\
             Size        Backup Date                Mgmt Class           A/I File
             ----        -----------                ----------           --- ----
        72,191  B  2016-04-01 02:17:31             STANDARD             A  /grid/0000ABCD
         Modified: 2016-04-01 01:52:11  Accessed: 2016-04-01 01:05:51  Inode changed: 2016-04-01
         Compression Type: None  Encryption Type:        None  Client-deduplicated: NO
  Media Class: Library  Volume ID: 724216  Restore Order: 00000000-00000002-00000000-00CEF5A1
"""
QUESTION = """\
--- User Action is Required ---
File '/fs1/x' exists
Select an appropriate action
Action [1,2,3,A] : """
ARCHIVE = """\
             Size  Archive Date - Time    File - Expires on - Description
             ----  -------------------    -------------------------------
        72,191  B  2016-04-01 02:17:31    /grid/pool/out/0000ABCD Never endit  RetInit:STARTED  ObjHeld:NO
         Modified: 2016-04-01 01:52:11  Accessed: 2016-04-01 01:05:51  Inode changed: 2016-04-01 01:59:24
         Compression Type: None  Encryption Type:        None  Client-deduplicated: NO
  Media Class: Library  Volume ID: 724216  Restore Order: 00000000-00000002-00000000-00CEF5A1
"""
SESSION = """\
IBM Spectrum Protect Server Connection Information

Home Server Name........: SERVER_A
Server Type.............: Linux/x86_64
Archive Retain Protect..: "No"
Server Version..........: Ver. 8, Rel. 1, Lev. 4.0
Last Access Date........: 09/24/2018 10:31:34
Delete Backup Files.....: "No"
Delete Archive Files....: "Yes"
Deduplication...........: "Server Only"

Node Name...............: NODE
User Name...............: root

SSL Information.........: TLSv1.2 TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384

Secondary Server Information
Not configured for failover
"""
OLD_BACKUP = "".join(
    line
    for line in BACKUP.splitlines(keepends=True)
    if not any(name in line for name in ("encrypted", "grew", "retries"))
)
SCHEDULED = """\
2024-12-17 16:52:58 --- SCHEDULEREC STATUS BEGIN
2024-12-17 16:52:58 Total number of objects inspected:            1
2024-12-17 16:52:58 ANS1029E Communication with the server is lost.
2024-12-17 16:52:58 --- SCHEDULEREC STATUS END
"""


@frozen
class Sample:
    """An output with its return code: as what it counts as a success, and its messages' codes."""

    name: str
    text: str
    status: int = 0
    good_as: tuple[str, ...] = ()
    codes: str = ""
    asks: bool = False


SAMPLES = (
    Sample("banner alone", ""),
    Sample("incremental", BACKUP, 0, ("backup",), "ANS1898I"),
    Sample("incremental, old client", OLD_BACKUP, 0, ("backup",), "ANS1898I"),
    Sample(
        "incremental, a file changed", FAILED_BACKUP, 4, (), "ANS1228E ANS4037E ANS1898I ANS1802E"
    ),
    Sample("incremental, rc 8", BACKUP, 8, (), "ANS1898I"),
    Sample("incremental, rc 12", BACKUP, 12, (), "ANS1898I"),
    Sample("restore", RESTORE, 0, ("restore",), "ANS1247I"),
    Sample("restore interrupted", INTERRUPTED, 12, (), "ANS1247I ANS1330S"),
    Sample("restore interrupted, rc 0", INTERRUPTED, 0, (), "ANS1247I ANS1330S"),
    Sample("query backup", QUERY, 0, ("list",)),
    Sample("query backup -detail", DETAIL, 0, ("list",)),
    Sample("query archive", ARCHIVE),
    Sample("query session", SESSION, 0, ("session",)),
    Sample(
        "nothing found",
        "ANS1092W No files matching search criteria were found",
        8,
        ("list",),
        "ANS1092W",
    ),
    Sample(
        "none on the server", "ANS1345E No objects on the server match '/a/b'", 12, (), "ANS1345E"
    ),
    Sample(
        "none of several",
        "ANS1345E No objects on the server match '/a/b'\nANS1302E No objects on server match query",
        12,
        (),
        "ANS1345E ANS1302E",
    ),
    Sample("all gone, rc 8", "ANS1302E No objects on server match query", 8, (), "ANS1302E"),
    Sample(
        "unreachable", "ANS1017E Session rejected: TCP/IP connection failure.", 12, (), "ANS1017E"
    ),
    Sample("lost", "ANS1029E Communication with the server is lost.", 12, (), "ANS1029E"),
    Sample("full", "ANS1311E Server out of data storage space.", 12, (), "ANS1311E"),
    Sample(
        "harmless warning",
        f"ANS1278W Virtual mount point is a file system.\n{BACKUP}",
        8,
        ("backup",),
        "ANS1278W ANS1898I",
    ),
    Sample("schedule log", SCHEDULED, 0, (), "ANS1029E"),
    Sample("question", QUESTION, -9, (), "", asks=True),
)
"""Every sample that there is."""
