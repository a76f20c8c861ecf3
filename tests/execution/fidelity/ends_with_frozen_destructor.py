import gc


class Thing:
    def __del__(self):
        print("freed")


thing = Thing()
gc.freeze()
