from concurrent.futures import ProcessPoolExecutor


def fail():
    raise ValueError("in the pool")


if __name__ == "__main__":
    with ProcessPoolExecutor(1) as pool:
        print(repr(pool.submit(fail).exception()))
