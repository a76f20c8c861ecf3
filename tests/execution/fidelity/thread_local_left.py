import threading


class Noisy:
    def __del__(self):
        print("freed")


local = threading.local()
local.thing = Noisy()
