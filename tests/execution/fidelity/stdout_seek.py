import sys

for stream in (sys.stdout, sys.stderr, sys.stdout.buffer):
    print(stream.seekable(), stream.readable(), stream.writable())
    try:
        print(stream.tell())
    except OSError as error:
        print(error)
