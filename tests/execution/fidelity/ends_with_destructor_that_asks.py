import threading


class Thing:
    def __del__(self):
        print(threading.main_thread().is_alive())


thing = Thing()
print("before")
