"""`caxev demo`: a whole collaboration on one machine, with real servers on loopback.

What belongs here is what a real installation has from elsewhere: `daq` stands in for the
experiment's data acquisition, `server` for each site's SSH server.
"""
