import atexit
import threading

atexit.register(lambda: threading.Thread(target=print, args=("in a late thread",)).start())
