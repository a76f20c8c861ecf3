import os

VALUE = "global"


def describe():
    return VALUE, os.path.sep


class Noisy:
    def __del__(self):
        print(describe())


thing = Noisy()
