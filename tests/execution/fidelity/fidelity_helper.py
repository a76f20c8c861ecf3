"""Imported by other scripts."""
import warnings

GREETING = "hello"
kept = []


def fail():
    raise ValueError("in the helper")


def open_and_write(name):
    file = open(name, "w")
    file.write("written by the helper, never closed")
    kept.append(file)


def deprecated():
    warnings.warn("do not use", DeprecationWarning, stacklevel=2)


class Noisy:
    def __init__(self, name):
        self.name = name

    def __del__(self):
        print("freed", self.name)
