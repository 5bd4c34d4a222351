"""Deliver a site's alarms to people: by mail, or by HTTP to Slack, PagerDuty or a program.

`listener` makes one `AlarmManager` (`manager`) for its site, which collects alarms and delivers
them to each sink of the site's ``alarms`` (`recipients`). A sink implements `Notifier` (`base`).
`health` watches the listener itself. `caxev.core.alarms` defines what an alarm is and when it is
delivered.

An entry point of the group ``caxev.alarms`` adds a kind of sink: a callable that takes the sink's
object in sites.json (without ``name``, ``severity`` and ``repeat``), returns a `Notifier`, and may
raise `ConfigError`.

Why not `apprise`? Version 2.3.0 was tried in place of `email` and `webhook` on local servers. It
has PagerDuty's dedup key and resolve, and checks certificates. But it reads an answer of any size
(400 MB took 785 MB of memory; ours stops at 1 kB), returns no reason for a failure, repeats a mail
to the recipients that have it as long as one other is refused (3 attempts, 3 mails), logs
PagerDuty's key and Slack's address at level DEBUG, leaves ``<!channel>`` in an alarm's text to
notify everybody, rejects a certificate that the machine trusts by ``SSL_CERT_FILE``, replaces our
bearer token by a password from ``~/.netrc``, and posts to PagerDuty's and Slack's own hosts only.
Retries, deadlines and reading secrets again would remain ours.
"""
