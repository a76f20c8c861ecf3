class Noisy:
    def __del__(self):
        print("freed")


def fail():
    local = Noisy()
    raise ValueError(type(local).__name__)


fail()
