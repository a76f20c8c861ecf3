import atexit
import pickle


class Point:
    pass


atexit.register(lambda: print(type(pickle.loads(pickle.dumps(Point())))))
