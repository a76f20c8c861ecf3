class Noisy:
    def __init__(self, name):
        self.name = name

    def __del__(self):
        print("freed", self.name, flush=True)


first = Noisy("first")
_private = Noisy("private")
second = Noisy("second")
cycle = Noisy("cycle")
cycle.myself = cycle
