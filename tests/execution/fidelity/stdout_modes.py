import sys

for stream in (sys.stdin, sys.stdout, sys.stderr):
    print(stream, stream.name, stream.mode, stream.encoding, stream.errors, stream.newlines, stream.line_buffering)
    print(stream.buffer, stream.buffer.raw, stream.fileno(), stream.isatty(), stream.closed, stream.write_through)
print(sys.stdout is sys.__stdout__, sys.stderr is sys.__stderr__, sys.stdin is sys.__stdin__)
