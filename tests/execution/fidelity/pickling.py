import pickle


class Point:
    def __init__(self, x):
        self.x = x


def double(x):
    return 2 * x


print(pickle.dumps(Point(1)), pickle.loads(pickle.dumps(Point(7))).x, pickle.loads(pickle.dumps(double))(4))
