import sys


class Noisy:
    def __del__(self, sys=sys):
        print(sys.is_finalizing())


kept = Noisy()
