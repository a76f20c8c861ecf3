import os
import signal
import threading
import time


def late():
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)


threading.Thread(target=late).start()
