"""Tape archives: one class for each kind, all behind one interface.

`base` has the interface, and finds the archive of a site's method; `tsm` and `directory` implement
it. `steps` has the operations for `caxev.handlers.tape` and the command line. Another kind of
archive is added by the entry point group ``caxev.tape``: the method's name, and the class.
"""
