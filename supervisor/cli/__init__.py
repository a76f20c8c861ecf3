"""The commands: what people and scripts type.

`main` parses and ends every command in one way: 0 = success, 1 = it did not succeed, 2 = wrong usage or
configuration, 3 = MongoDB cannot be reached; errors are one line on stderr. The other modules are loaded when their
command runs, so that `--help` needs neither MongoDB's driver nor rich. A command that loses MongoDB ends with 3 and
has changed nothing halfway: every change is one conditional write.
"""
