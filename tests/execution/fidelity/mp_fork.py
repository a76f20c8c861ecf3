import multiprocessing
import os


def square(x):
    return x * x


if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    with context.Pool(2) as pool:
        print(pool.map(square, range(5)))
    process = context.Process(target=os._exit, args=(3,))
    process.start()
    process.join()
    print(process.exitcode, process.name)
