import sys


class Stream:
    def write(self, text):
        pass

    def flush(self):
        raise RuntimeError("cannot flush")


sys.stdout = Stream()
