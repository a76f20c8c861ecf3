import sys
import threading

print(threading.main_thread().is_alive())
sys.settrace(None)
threading._register_atexit(print, "at the end of the threads")
