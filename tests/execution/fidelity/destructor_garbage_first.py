class Noisy:
    def __init__(self, name):
        self.name = name

    def __del__(self):
        print("freed", self.name)


def make_garbage():
    garbage = Noisy("cyclic garbage")
    garbage.myself = garbage


make_garbage()
kept = Noisy("global")
