import threading
import time

VALUE = "still there"


class Thing:
    pass


def late():
    time.sleep(0.05)
    print(VALUE, Thing.__module__, __import__("sys").modules["__main__"].VALUE)


threading.Thread(target=late).start()
