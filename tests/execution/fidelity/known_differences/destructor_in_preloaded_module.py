import signal


class Noisy:
    def __del__(self):
        print("freed")


signal.kept = Noisy()
