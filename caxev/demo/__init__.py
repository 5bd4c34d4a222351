"""`caxev demo`: a whole collaboration on one machine, with real servers on loopback.

The modules replace parts of a real installation: `daq` the experiment's data acquisition, `server`
each site's SSH server.
"""
