import threading
import time


def late():
    time.sleep(0.1)
    print("late", threading.current_thread().name, __name__, threading.main_thread().is_alive())


threading.Thread(target=late).start()
print("end", threading.current_thread(), threading.active_count())
